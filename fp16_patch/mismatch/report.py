"""Run records, shown: a comparison in the terminal, a self-contained page with plots over steps.

A record is the directory that a monitored run leaves: ``plan.json``, ``mismatch.jsonl``, ``steps.jsonl`` and
``ledger.json``. A killed run leaves some of it; what is there is shown, what is missing is said.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp16_patch.mismatch.stats import BINS_PER_DECADE, BINS_PER_SIGN, MismatchStats, bin_edges

RECORD_FILES = ("plan.json", "mismatch.jsonl", "steps.jsonl", "ledger.json")
RECORD_FOLDER = "fp16_patch"

QUANTITIES = (
    "autocast",
    "parameter",
    "master",
    "activation",
    "gradient",
    "wire",
    "engine_weight",
    "kv_cache",
    "logits",
    "log_prob",
    "entropy",
)
FLOAT32_BY_DESIGN = frozenset({"master", "gradient", "wire", "logits", "log_prob", "entropy"})
COMPUTE_QUANTITIES = ("activation", "autocast", "parameter")
DTYPE_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}

Ledger = dict[str, dict[str, list[str]]]
Runs = Mapping[str, "RunRecord"]


@dataclass(frozen=True)
class RunRecord:
    """One run as it was recorded. ``steps`` and ``mismatch`` map a step to its metrics, in the order of steps."""

    path: Path
    plan: dict[str, Any]
    ledger: Ledger
    processes: int
    steps: dict[int, dict[str, float]]
    mismatch: dict[int, dict[str, float]]
    stats: MismatchStats
    wall_s: float | None
    notes: list[str] = field(default_factory=list)

    def total(self) -> MismatchStats:
        """The mismatch of all steps, merged."""
        return self.stats

    def series(self, metric: str) -> dict[int, float]:
        """The metric's finite values by step, wherever it was recorded."""
        merged = {step: self.steps.get(step, {}) | self.mismatch.get(step, {}) for step in self.recorded_steps()}
        values = {step: metrics.get(metric, math.nan) for step, metrics in merged.items()}
        return {step: value for step, value in values.items() if math.isfinite(value)}

    def recorded_steps(self) -> list[int]:
        return sorted(self.steps.keys() | self.mismatch.keys())

    def summary(self) -> dict[str, Any]:
        """What a run comes to; means are over all tokens of all steps, NaN where nothing was recorded."""
        totals = self.total().metrics(prefix="")
        scales = list(self.series("fp16/loss_scale").values())
        return {
            "steps": len(self.recorded_steps()),
            "tokens": self.total().tokens,
            "wall_s": self.wall_s,
            "reward": list(self.series("critic/score/mean").values()),
            "loss_scale": scales[-1] if scales else None,
            "skipped": int(max(self.series("fp16/skipped_total").values(), default=0)),
            "ledger": self.ledger,
            "mismatch": {
                name: totals[name] for name in ("mean_abs", "max_abs", "seq_mean_abs", "k1", "k3", "prob_mean_abs")
            },
        }

    def planned_dtype(self) -> str | None:
        """The dtype the plan asks for, by its torch name; None if no plan was recorded."""
        dtype = self.plan.get("dtype")
        return None if dtype is None else _dtype_name(dtype)

    def dtypes_of(self, quantities: Iterable[str], role_prefix: str = "") -> list[str]:
        """Dtypes seen in the roles that start so, of the first of ``quantities`` that was seen at all."""
        for quantity in quantities:
            seen = {
                dtype
                for role, row in self.ledger.items()
                if role.startswith(role_prefix)
                for dtype in row.get(quantity, [])
            }
            if seen:
                return sorted(seen)
        return []

    def compute_dtypes(self, role: str) -> list[str]:
        """Dtypes seen in the role, apart from what is float32 by design."""
        row = self.ledger.get(role, {})
        return sorted({dtype for quantity in row.keys() - FLOAT32_BY_DESIGN for dtype in row[quantity]})

    def deviations(self) -> list[tuple[str, str, list[str]]]:
        """(role, quantity, dtypes) wherever a dtype was seen that the plan does not allow."""
        return [
            (role, quantity, dtypes)
            for role, row in self.ledger.items()
            for quantity, dtypes in row.items()
            if self.deviates(quantity, dtypes)
        ]

    def deviates(self, quantity: str, dtypes: Iterable[str]) -> bool:
        planned = self.planned_dtype()
        allowed = {planned, "float32"} if quantity in FLOAT32_BY_DESIGN else {planned}
        return planned is not None and not set(dtypes) <= allowed


def load_run(path: str | Path) -> RunRecord:
    """Read the record at ``path``, or in its folder ``fp16_patch``.

    Unreadable lines are left out and noted; of lines with the same step (a resumed run) the last one counts.

    Raises:
        FileNotFoundError: neither directory holds any file of a record.
    """
    folder = _record_folder(Path(path))
    notes = [f"{name} is missing" for name in RECORD_FILES if not (folder / name).is_file()]
    ledger = _read_object(folder / "ledger.json", notes)
    steps = _read_lines(folder / "steps.jsonl", notes)
    mismatch = _read_lines(folder / "mismatch.jsonl", notes)
    return RunRecord(
        path=folder,
        plan=_read_object(folder / "plan.json", notes),
        ledger=_merge_roles(ledger),
        processes=len(ledger.get("processes", [])),
        steps={step: _metrics(line) for step, line in steps.items()},
        mismatch={step: _metrics(line) for step, line in mismatch.items()},
        stats=_merge_states(mismatch, notes),
        wall_s=_wall_seconds([*(steps or mismatch).values()]),
        notes=notes,
    )


def _record_folder(path: Path) -> Path:
    candidates = (path, path / RECORD_FOLDER)
    for folder in candidates:
        if any((folder / name).is_file() for name in RECORD_FILES):
            return folder
    raise FileNotFoundError(
        f"no run record: looked for {', '.join(RECORD_FILES)} in {' and '.join(map(str, candidates))}. "
        "Give the record directory of a run that had fp16_patch active, or its parent."
    )


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        content = None
    if isinstance(content, dict):
        return content
    notes.append(f"{path.name} is not a whole JSON object, and left out")
    return {}


def _read_lines(path: Path, notes: list[str]) -> dict[int, dict[str, Any]]:
    if not path.is_file():
        return {}
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    parsed = [_parse_line(line) for line in lines]
    if parsed and parsed[-1] is None:
        notes.append(f"{path.name}: the last line is cut off, and left out")
    unreadable = sum(line is None for line in parsed[:-1])
    if unreadable:
        notes.append(f"{path.name}: {unreadable} unreadable lines left out")
    by_step = {line["step"]: line for line in parsed if line is not None}
    return dict(sorted(by_step.items()))


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None


def _metrics(line: dict[str, Any]) -> dict[str, float]:
    metrics = line.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def _merge_states(lines: dict[int, dict[str, Any]], notes: list[str]) -> MismatchStats:
    total = MismatchStats.empty()
    for step, line in lines.items():
        try:
            total += MismatchStats.from_dict(line["state"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            notes.append(f"mismatch.jsonl: step {step} is not in the totals: {error!r}")
    return total


def _merge_roles(ledger: dict[str, Any]) -> Ledger:
    tables = [ledger["roles"]] if ledger.get("roles") else [row.get("roles", {}) for row in ledger.get("processes", [])]
    merged: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for table in tables:
        for role, row in table.items():
            for quantity, dtypes in row.items():
                merged[role][quantity] |= {_dtype_name(dtype) for dtype in dtypes}
    return {role: {quantity: sorted(seen) for quantity, seen in row.items()} for role, row in merged.items()}


def _dtype_name(dtype: object) -> str:
    name = str(dtype).removeprefix("torch.")
    return DTYPE_ALIASES.get(name, name)


def _wall_seconds(lines: Sequence[dict[str, Any]]) -> float | None:
    times = [line["time"] for line in lines if isinstance(line.get("time"), int | float)]
    return max(times) - min(times) if times else None


# --- comparison: one table, shown twice


def print_comparison(runs: Runs, console: Console) -> None:
    """Print the runs side by side, a column each; ratios are of the first run's mean |d| to each run's."""
    table = Table(title="Sampler/learner mismatch, d = log π_learner − log μ_sampler", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right", overflow="fold")
    for label, cells in _comparison(runs):
        table.add_row(label, *cells)
    console.print(table)
    for sentence in _verdict(runs):
        console.print(sentence, markup=False, highlight=False)
    for name, run in runs.items():
        for note in run.notes:
            console.print(f"{name}: {note}", style="dim", markup=False, highlight=False)


def _comparison(runs: Runs) -> list[tuple[str, list[str]]]:
    """Rows of (label, a cell for each run)."""
    summaries = {name: run.summary() for name, run in runs.items()}
    first = next(iter(summaries), "")
    against_first = f"mean |d| of {first} ÷ this"

    def mismatch(key: str) -> Callable[[str], str]:
        return lambda name: _number(summaries[name]["mismatch"][key])

    def ratio(name: str) -> str:
        return _times(_ratio(summaries[first]["mismatch"]["mean_abs"], summaries[name]["mismatch"]["mean_abs"]))

    rows: dict[str, Callable[[str], str]] = {
        "plan": lambda name: _plan_text(runs[name].plan),
        "steps": lambda name: _number(summaries[name]["steps"]),
        "tokens": lambda name: _number(summaries[name]["tokens"]),
        "wall time": lambda name: _duration(summaries[name]["wall_s"]),
        "mean |d|": mismatch("mean_abs"),
        against_first: ratio,
        "max |d|": mismatch("max_abs"),
        "mean |Σd| a sequence": mismatch("seq_mean_abs"),
        "mean |Δp|": mismatch("prob_mean_abs"),
        "k1 = mean(−d)": mismatch("k1"),
        "k3 = mean(r − 1 − d)": mismatch("k3"),
        "non-finite tokens": lambda name: _number(runs[name].total().nonfinite_tokens),
        "reward, first → last": lambda name: _first_to_last(summaries[name]["reward"]),
        "loss scale": lambda name: _number(summaries[name]["loss_scale"]),
        "skipped steps": lambda name: _number(summaries[name]["skipped"]),
        "actor compute": lambda name: _dtypes_text(runs[name].dtypes_of(COMPUTE_QUANTITIES, "actor")),
        "sampler weights": lambda name: _dtypes_text(runs[name].dtypes_of(["engine_weight"])),
    }
    if len(runs) < 2:
        del rows[against_first]
    return [(label, [cell(name) for name in runs]) for label, cell in rows.items()]


def _verdict(runs: Runs) -> list[str]:
    """Sentences for the head of the page, the most important first."""
    return [_mismatch_verdict(runs), *(_ledger_verdict(name, run) for name, run in runs.items())]


def _mismatch_verdict(runs: Runs) -> str:
    means = {name: run.summary()["mismatch"]["mean_abs"] for name, run in runs.items()}
    measured = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not measured:
        return "No mismatch was measured."
    best = min(measured, key=measured.__getitem__)
    worst = max(measured, key=measured.__getitem__)
    if best == worst:
        return f"{best}: mean |d| is {_number(measured[best])} over {_number(runs[best].total().tokens)} tokens."
    factor = _times(_ratio(measured[worst], measured[best]))
    return f"{best} has the smallest mismatch: mean |d| is {_number(measured[best])}, {factor} less than in {worst}."


def _ledger_verdict(name: str, run: RunRecord) -> str:
    if not run.ledger:
        return f"{name}: no dtypes were recorded."
    if run.planned_dtype() is None:
        return _uniformity_verdict(name, run)
    deviations = run.deviations()
    if not deviations:
        return f"{name}: every recorded dtype is as planned, {run.planned_dtype()}."
    listed = "; ".join(f"{role} {quantity} in {_dtypes_text(dtypes)}" for role, quantity, dtypes in deviations)
    return f"▲ {name}: planned {run.planned_dtype()}, but saw {listed}."


def _uniformity_verdict(name: str, run: RunRecord) -> str:
    """For a run that was only observed: nothing says which dtype is right, only whether there is one."""
    by_role = {role: run.compute_dtypes(role) for role in sorted(run.ledger)}
    distinct = {dtype for dtypes in by_role.values() for dtype in dtypes}
    if len(distinct) <= 1:
        return f"{name}: no dtype was planned; compute was {_dtypes_text(sorted(distinct))} throughout."
    listed = "; ".join(f"{role} in {_dtypes_text(dtypes)}" for role, dtypes in by_role.items() if dtypes)
    return f"▲ {name}: no dtype was planned, and compute was mixed: {listed}."


def _plan_text(plan: dict[str, Any]) -> str:
    return ", ".join(str(plan[key]) for key in ("mode", "dtype") if plan.get(key)) or "–"


def _dtypes_text(dtypes: Sequence[str]) -> str:
    return ", ".join(dtypes) or "–"


def _first_to_last(values: Sequence[float]) -> str:
    return f"{_number(values[0])} → {_number(values[-1])}" if values else "–"


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _times(ratio: float) -> str:
    return f"{_number(ratio)}×" if math.isfinite(ratio) else "–"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _number(value: float | None) -> str:
    """Three significant digits; whole numbers in full; – where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.3g}" if 0.1 <= abs(value) < 999.5 else _scientific(f"{value:.2e}")


def _tick_number(value: float) -> str:
    """As many digits as the tick has, without rounding noise: 0.25, 2e-3, 1 500."""
    if value == 0 or 0.01 <= abs(value) < 1e4:
        return _number(value) if float(value).is_integer() else f"{value:.6g}"
    mantissa, exponent = f"{value:.6e}".split("e")
    return _scientific(f"{float(mantissa):g}e{exponent}")


def _scientific(number: str) -> str:
    mantissa, exponent = number.split("e")
    return f"{mantissa}e{int(exponent)}"


# --- charts: inline SVG

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 10, 44
MARKED_POINTS = 60
HOVER_POINTS = 240
COLOURS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A scale with ticks. ``base`` is 10 or 2 for a logarithmic axis, None for a linear one."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    base: int | None = None

    def share(self, value: float) -> float:
        """Position along the axis, 0 at ``low`` and 1 at ``high``; what lies outside is put on the end."""
        low, high, value = (self._linear(number) for number in (self.low, self.high, max(value, self.low)))
        return min(1.0, (value - low) / (high - low)) if high > low else 0.5

    def _linear(self, value: float) -> float:
        return math.log(value) if self.base else value

    def tick_text(self, tick: float) -> str:
        if self.base is None:
            return _tick_number(tick)
        exponent = math.floor(math.log(tick, self.base) + 1e-9)
        factor = round(tick / self.base**exponent)
        power = f"{self.base}{str(exponent).translate(SUPERSCRIPTS)}"
        return power if factor == 1 else f"{factor}·{power}"


@dataclass(frozen=True)
class Line:
    """One run's values along x, in the colour and marker of ``style``, and in its dash unless ``dash`` is given."""

    name: str
    style: int
    points: dict[float, float]
    dash: str | None = None


@dataclass(frozen=True)
class Chart:
    """Lines on two axes. ``extras`` is SVG that a kind of chart draws besides them, such as bands and skip marks."""

    title: str
    lines: list[Line]
    x: Axis
    y: Axis
    caption: str = ""
    extras: str = ""


def linear_axis(label: str, values: Iterable[float], snug: bool = False, whole: bool = False) -> Axis:
    """An axis from round number to round number; ``snug``: from the least to the greatest value."""
    least, greatest = min(values := list(values)), max(values)
    if least == greatest and not snug:
        least, greatest = least - (abs(least) or 1) / 10, greatest + (abs(greatest) or 1) / 10
    step = _round_step((greatest - least) / 5 or 1.0)
    step = max(1.0, round(step)) if whole else step
    if snug:
        inside = range(math.ceil(least / step - 1e-9), math.floor(greatest / step + 1e-9) + 1)
        return Axis(label, least, greatest, tuple(index * step for index in inside))
    around = range(math.floor(least / step + 1e-9), math.ceil(greatest / step - 1e-9) + 1)
    return Axis(label, around[0] * step, around[-1] * step, tuple(index * step for index in around))


def decade_axis(label: str, values: Iterable[float]) -> Axis:
    """A base-10 axis that ends at 1, 2 or 5 times a power of ten; ticks at powers alone where there are many."""
    positive = [value for value in values if value > 0]
    grid = [factor * 10.0**exponent for exponent in range(-24, 25) for factor in (1, 2, 5)]
    below = [index for index, tick in enumerate(grid) if tick <= min(positive) * 1.0000001]
    above = [index for index, tick in enumerate(grid) if tick >= max(positive) / 1.0000001]
    first, last = (below or [0])[-1], (above or [len(grid) - 1])[0]
    last = max(last, first + 1)
    ticks = grid[first : last + 1]
    if len(ticks) > 7:
        powers = grid[first - first % 3 : last + (-last) % 3 + 1 : 3]
        return Axis(label, powers[0], powers[-1], tuple(powers[:: math.ceil(len(powers) / 9)]), base=10)
    return Axis(label, ticks[0], ticks[-1], tuple(ticks), base=10)


def octave_axis(label: str, values: Iterable[float]) -> Axis:
    """A base-2 axis from a power to a power, with room for a mark above the greatest value."""
    exponents = [math.log2(value) for value in values if value > 0]
    first, last = math.floor(min(exponents)) - 1, math.ceil(max(exponents)) + 1
    stride = math.ceil((last - first) / 7)
    return Axis(
        label, 2.0**first, 2.0**last, tuple(2.0**exponent for exponent in range(first, last + 1, stride)), base=2
    )


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.9999999)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - BOTTOM - TOP)


def _figure(chart: Chart) -> str:
    names = {line.name: line.style for line in chart.lines}
    legend = "".join(f"<span>{_legend_key(style)}{escape(name)}</span>" for name, style in names.items())
    caption = f"<p>{escape(chart.caption)}</p>" if chart.caption else ""
    return (
        f'<figure><figcaption><h3>{escape(chart.title)}</h3>{caption}<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
        f"{_grid(chart)}{chart.extras}{''.join(_line(chart, line) for line in chart.lines)}</svg></figure>"
    )


def _grid(chart: Chart) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in chart.y.ticks:
        y = _y(chart.y, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 7}" y="{y + 4:.1f}">{chart.y.tick_text(tick)}</text>')
    for tick in chart.x.ticks:
        x = _x(chart.x, tick)
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{bottom + 17}">{chart.x.tick_text(tick)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="label" x="{(LEFT + right) / 2}" y="{HEIGHT - 6}">{escape(chart.x.label)}</text>')
    parts.append(f'<text class="label" transform="translate(13 {middle}) rotate(-90)">{escape(chart.y.label)}</text>')
    return "".join(parts)


def _line(chart: Chart, line: Line) -> str:
    points = [(x, y) for x, y in line.points.items() if y > 0 or not chart.y.base]
    if not points:
        return ""
    path = " ".join(f"{_x(chart.x, x):.1f},{_y(chart.y, y):.1f}" for x, y in points)
    dash = _dash(line.style) if line.dash is None else line.dash
    drawn = f'<polyline class="line s{line.style % COLOURS}" points="{path}"{_dash_attribute(dash)}/>'
    return drawn + _marks(chart, line, points)


def _marks(chart: Chart, line: Line, points: list[tuple[float, float]]) -> str:
    """Markers with the value as their title; on a long line every few points only, and seen under the pointer only."""
    every = math.ceil(len(points) / HOVER_POINTS)
    shown = "mark" if len(points) <= MARKED_POINTS else "mark quiet"
    return "".join(
        f'<g class="{shown} s{line.style % COLOURS}"><title>{escape(_hover_text(chart, line, x, y))}</title>'
        f'<path d="{_marker(line.style, _x(chart.x, x), _y(chart.y, y))}"/></g>'
        for x, y in points[::every]
    )


def _hover_text(chart: Chart, line: Line, x: float, y: float) -> str:
    return f"{line.name}, {chart.x.label} {_number(x)}: {_number(y)}"


def _marker(style: int, x: float, y: float, radius: float = 3.4) -> str:
    wide, tall, side = 1.25 * radius, 2.2 * radius, 1.35 * radius
    shapes = (
        f"M{x - radius:.1f} {y:.1f}a{radius} {radius} 0 1 0 {2 * radius} 0a{radius} {radius} 0 1 0 {-2 * radius} 0z",
        f"M{x - radius:.1f} {y - radius:.1f}h{2 * radius}v{2 * radius}h{-2 * radius}z",
        f"M{x:.1f} {y - 1.3 * radius:.1f}l{wide:.2f} {tall:.2f}h{-2 * wide:.2f}z",
        f"M{x:.1f} {y - side:.1f}l{side:.2f} {side:.2f}l{-side:.2f} {side:.2f}l{-side:.2f} {-side:.2f}z",
    )
    return shapes[style % len(shapes)]


def _dash(style: int) -> str:
    return DASHES[style // COLOURS % len(DASHES)]


def _dash_attribute(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def _legend_key(style: int) -> str:
    line = f'<line class="line s{style % COLOURS}" x1="0" x2="26" y1="6" y2="6"{_dash_attribute(_dash(style))}/>'
    mark = f'<path class="mark s{style % COLOURS}" d="{_marker(style, 13, 6)}"/>'
    return f'<svg class="key" viewBox="0 0 26 12" aria-hidden="true">{line}{mark}</svg>'


# --- the charts of a report


def _charts(runs: Runs) -> list[Chart]:
    """The charts that have something to show."""
    candidates = [
        _series_chart(runs, "Mean |d| of a token", "mismatch/mean_abs", "mean |d| (nats)", decade_axis),
        _band_chart(runs),
        _series_chart(runs, "Mean |Σd| of a sequence", "mismatch/seq_mean_abs", "mean |Σd| (nats)", decade_axis),
        _histogram_chart(runs),
        _series_chart(runs, "k1 = mean(−d)", "mismatch/k1", "k1 (nats)", linear_axis),
        _series_chart(runs, "k3 = mean(r − 1 − d)", "mismatch/k3", "k3 (nats)", decade_axis),
        _series_chart(runs, "Reward", "critic/score/mean", "mean score", linear_axis),
        _series_chart(runs, "Gradient norm of the actor", "actor/grad_norm", "gradient norm", _linear_or_decades),
        _loss_scale_chart(runs),
    ]
    return [chart for chart in candidates if chart is not None]


def _series_chart(
    runs: Runs, title: str, metric: str, label: str, y_axis: Callable[[str, list[float]], Axis]
) -> Chart | None:
    lines = [Line(name, style, _points(run, metric)) for style, (name, run) in enumerate(runs.items())]
    lines = [line for line in lines if line.points]
    values = [value for line in lines for value in line.points.values()]
    if not values or (y_axis is decade_axis and max(values) <= 0):
        return None
    return Chart(title, lines, _step_axis(lines), y_axis(label, values))


def _band_chart(runs: Runs) -> Chart | None:
    """The band from the median to p99.9, clipped at the bottom where the median is zero."""
    middle, top = (
        [Line(name, style, _points(run, metric), dash) for style, (name, run) in enumerate(runs.items())]
        for metric, dash in (("mismatch/abs_p50", None), ("mismatch/abs_p99_9", "5 3"))
    )
    lines = [line for line in (*middle, *top) if line.points]
    values = [value for line in lines for value in line.points.values() if value > 0]
    if not values:
        return None
    x, y = _step_axis(lines), decade_axis("|d| (nats)", values)
    bands = "".join(_band(x, y, low, high) for low, high in zip(middle, top, strict=True))
    caption = "Solid: the median; dashed: p99.9, exceeded by one token in a thousand."
    return Chart("Spread of |d|, p50 to p99.9", lines, x, y, caption, bands)


def _band(x: Axis, y: Axis, low: Line, high: Line) -> str:
    steps = sorted(low.points.keys() & high.points.keys())
    outline = [(step, high.points[step]) for step in steps] + [(step, low.points[step]) for step in reversed(steps)]
    points = " ".join(f"{_x(x, step):.1f},{_y(y, value):.1f}" for step, value in outline)
    return f'<polygon class="band s{low.style % COLOURS}" points="{points}"/>'


def _loss_scale_chart(runs: Runs) -> Chart | None:
    chart = _series_chart(runs, "Loss scale", "fp16/loss_scale", "loss scale", octave_axis)
    if chart is None:
        return None
    skips = "".join(
        _skip_mark(chart, name, style, step)
        for style, (name, run) in enumerate(runs.items())
        for step, skipped in run.series("fp16/step_skipped").items()
        if skipped > 0 and step in run.series("fp16/loss_scale")
    )
    caption = "× marks a skipped step: a gradient overflowed, the weights stayed." if skips else "No step was skipped."
    return Chart(chart.title, chart.lines, chart.x, chart.y, caption, skips)


def _skip_mark(chart: Chart, name: str, style: int, step: int) -> str:
    value = chart.lines[[line.name for line in chart.lines].index(name)].points[step]
    x, y = _x(chart.x, step), _y(chart.y, value) - 11
    return (
        f'<g class="skip s{style % COLOURS}"><title>{escape(name)}, step {step}: skipped at {_number(value)}</title>'
        f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/></g>'
    )


def _histogram_chart(runs: Runs) -> Chart | None:
    """The share of finite tokens in each sixth of a decade of |d|, from the merged histograms."""
    lines = [Line(name, style, _histogram_points(run.total())) for style, (name, run) in enumerate(runs.items())]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    magnitudes = [x for line in lines for x in line.points]
    shares = [share for line in lines for share in line.points.values()]
    zeros = ", ".join(f"{name} {_zero_share(run.total()):.2g} %" for name, run in runs.items() if run.total().tokens)
    x, y = decade_axis("|d| (nats)", magnitudes), decade_axis("share of tokens", shares)
    caption = f"Share of tokens in each sixth of a decade. Below 1e-9, hence not drawn: {zeros}."
    return Chart("Distribution of |d|", lines, x, y, caption)


def _histogram_points(stats: MismatchStats, bins: int = BINS_PER_DECADE // 6) -> dict[float, float]:
    if not stats.finite_tokens:
        return {}
    counts = stats.abs_histogram()[1:].reshape(BINS_PER_SIGN // bins, bins).sum(dim=1)
    edges = bin_edges()[::bins]
    centres = (edges[:-1] * edges[1:]).sqrt()
    pairs = zip(centres.tolist(), counts.tolist(), strict=True)
    return {centre: count / stats.finite_tokens for centre, count in pairs if count}


def _zero_share(stats: MismatchStats) -> float:
    return 100 * _ratio(int(stats.abs_histogram()[0]), stats.finite_tokens)


def _points(run: RunRecord, metric: str) -> dict[float, float]:
    return {float(step): value for step, value in run.series(metric).items()}


def _step_axis(lines: Sequence[Line]) -> Axis:
    return linear_axis("step", [step for line in lines for step in line.points], snug=True, whole=True)


def _linear_or_decades(label: str, values: list[float]) -> Axis:
    wide = min(values) > 0 and max(values) > 100 * min(values)
    return decade_axis(label, values) if wide else linear_axis(label, values)


# --- the page

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#17191c;--soft:#5c636d;--rule:#dfe3e8;--warn:#8f3d00;
--warn-fill:#fdebdc;--c0:#2a6fd0;--c1:#d9541e;--c2:#0f8f68;--c3:#b07a00;--c4:#c2407f;--c5:#5a48b8}
@media(prefers-color-scheme:dark){:root{--page:#121417;--card:#1b1e23;--ink:#e8eaed;--soft:#9ba3ae;--rule:#333941;
--warn:#ffb583;--warn-fill:#42270f;--c0:#6aa7f5;--c1:#f08555;--c2:#3cc496;--c3:#dfae3a;--c4:#ec86b4;--c5:#a598f2}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}h2{font-size:19px;margin:40px 0 12px}h3{font-size:15px;margin:0}
p{margin:0}.soft,figcaption p,caption{color:var(--soft);font-size:13px}
.verdict{background:var(--card);border:1px solid var(--rule);border-left:4px solid var(--c0);border-radius:8px;
padding:14px 18px;margin:20px 0}
.verdict strong{display:block;font-size:18px;line-height:1.4}.verdict ul{margin:6px 0 0;padding-left:20px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:8px;margin:0 0 16px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:10px 14px 4px}caption b{color:var(--ink);font-size:15px;margin-right:8px}
th,td{padding:6px 14px;text-align:right;border-top:1px solid var(--rule);white-space:nowrap}
thead th{border-top:0}caption+thead th{color:var(--soft);font-weight:500}
tr>:first-child{text-align:left}tbody th{font-weight:400;color:var(--soft)}
td.deviates{background:var(--warn-fill);color:var(--warn);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:14px 14px 8px;
display:flex;flex-direction:column;justify-content:space-between}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin:4px 0 6px}
.legend span{display:inline-flex;align-items:center;gap:6px}.key{width:26px;height:12px;overflow:visible}
figure>svg{width:100%;height:auto;display:block;overflow:visible}
svg text{fill:var(--soft);font-size:12px}text.y{text-anchor:end}text.x,text.label{text-anchor:middle}
.grid{stroke:var(--rule)}.axis,.tick{stroke:var(--soft)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.mark,.mark path{fill:var(--c);stroke:var(--card);stroke-width:1}.mark:hover path{stroke:var(--ink);stroke-width:2}
.quiet path{opacity:0}.quiet:hover path{opacity:1}
.band{fill:var(--c);opacity:.13}.skip path{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linecap:round}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}.s5{--c:var(--c5)}
details{margin-top:8px}summary{cursor:pointer}pre{overflow-x:auto;font-size:13px;margin:8px 0 0}
@media print{body{background:#fff}figure,.scroll{break-inside:avoid}}
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1><p class="soft">d = log π<sub>learner</sub> − log μ<sub>sampler</sub> of each sampled token,
r = exp(d), Δp the difference of the probabilities. Point at a mark to read its value.</p>
{verdict}
<h2>Comparison</h2>{comparison}
<h2>Over the steps</h2>{charts}
<h2>Dtypes that were seen</h2>{ledgers}
<h2>Records</h2>{records}
</main></body></html>
"""


def write_html(runs: Runs, path: str | Path, title: str = "Sampler/learner mismatch") -> None:
    """Write one page that needs no network and no script: verdict, comparison, charts, ledgers, plans and notes.

    Raises:
        ValueError: there is no run to show.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    charts = "".join(_figure(chart) for chart in _charts(runs))
    page = PAGE.format(
        title=escape(title),
        style=STYLE,
        verdict=_verdict_html(runs),
        comparison=_comparison_html(runs),
        charts=f'<div class="charts">{charts}</div>' if charts else "<p>No step was recorded.</p>",
        ledgers="".join(_ledger_html(name, run) for name, run in runs.items()),
        records="".join(_record_html(name, run) for name, run in runs.items()),
    )
    Path(path).write_text(page, encoding="utf-8")


def _verdict_html(runs: Runs) -> str:
    first, *rest = map(escape, _verdict(runs))
    return f'<div class="verdict"><strong>{first}</strong><ul>{"".join(f"<li>{line}</li>" for line in rest)}</ul></div>'


def _comparison_html(runs: Runs) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in runs)
    body = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for label, cells in _comparison(runs)
    )
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _ledger_html(name: str, run: RunRecord) -> str:
    seen = {quantity for row in run.ledger.values() for quantity in row}
    quantities = [*(quantity for quantity in QUANTITIES if quantity in seen), *sorted(seen - {*QUANTITIES})]
    if not quantities:
        return f'<p class="soft"><b>{escape(name)}</b>: no dtypes were recorded.</p>'
    head = "".join(f"<th>{escape(quantity)}</th>" for quantity in quantities)
    body = "".join(
        f"<tr><th>{escape(role)}</th>{''.join(_ledger_cell(run, row, quantity) for quantity in quantities)}</tr>"
        for role, row in sorted(run.ledger.items())
    )
    caption = (
        f"<b>{escape(name)}</b>planned {run.planned_dtype() or 'no dtype'}; {run.processes} processes. {_LEDGER_KEY}"
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>'
        f"<thead><tr><th>role</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


_LEDGER_KEY = "▲ differs from the plan; float32 is by design in " + ", ".join(
    quantity for quantity in QUANTITIES if quantity in FLOAT32_BY_DESIGN
)


def _ledger_cell(run: RunRecord, row: dict[str, list[str]], quantity: str) -> str:
    dtypes = row.get(quantity, [])
    text = escape(_dtypes_text(dtypes))
    if run.deviates(quantity, dtypes):
        return f'<td class="deviates" title="planned {escape(str(run.planned_dtype()))}">▲ {text}</td>'
    return f"<td>{text}</td>"


def _record_html(name: str, run: RunRecord) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    plan = escape(json.dumps(run.plan, indent=2, sort_keys=True))
    return (
        f'<div class="verdict"><b>{escape(name)}</b> <span class="soft">{escape(str(run.path))}</span>'
        f"<ul>{notes or '<li>complete</li>'}</ul><details><summary>Plan</summary><pre>{plan}</pre></details></div>"
    )
