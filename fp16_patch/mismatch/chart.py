"""Charts of runs over their steps, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from fp16_patch.mismatch.comparison import number_text, ratio
from fp16_patch.mismatch.record import RunRecord, Runs
from fp16_patch.mismatch.stats import BINS_PER_DECADE, BINS_PER_SIGN, MismatchStats, bin_edges

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


def _tick_number(value: float) -> str:
    """As many digits as the tick has, without rounding noise: 0.25, 2e-3, 1 500."""
    if value == 0 or 0.01 <= abs(value) < 1e4:
        return number_text(value) if float(value).is_integer() else f"{value:.6g}"
    mantissa, exponent = f"{value:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.9999999)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - BOTTOM - TOP)


def figure(chart: Chart) -> str:
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
    return f"{line.name}, {chart.x.label} {number_text(x)}: {number_text(y)}"


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


def charts(runs: Runs) -> list[Chart]:
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
        f'<g class="skip s{style % COLOURS}">'
        f"<title>{escape(name)}, step {step}: skipped at {number_text(value)}</title>"
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
    return 100 * ratio(int(stats.abs_histogram()[0]), stats.finite_tokens)


def _points(run: RunRecord, metric: str) -> dict[float, float]:
    return {float(step): value for step, value in run.series(metric).items()}


def _step_axis(lines: Sequence[Line]) -> Axis:
    return linear_axis("step", [step for line in lines for step in line.points], snug=True, whole=True)


def _linear_or_decades(label: str, values: list[float]) -> Axis:
    wide = min(values) > 0 and max(values) > 100 * min(values)
    return decade_axis(label, values) if wide else linear_axis(label, values)
