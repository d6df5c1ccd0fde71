"""Reads a run record, the directory that a monitored run leaves."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.record.lines import (
    Coverage,
    Line,
    StandingAlert,
    alerts_of,
    coverage_of,
    metrics_of,
    parse_line,
)
from fp16_patch.mismatch.statistics.summary import MismatchStats, WorstToken
from fp16_patch.plan.dtypes import COMPUTE_OR_FP32, STAYS_FP32, torch_name

PLAN, MISMATCH, STEPS, LEDGER = "plan.json", "mismatch.jsonl", "steps.jsonl", "ledger.json"
RECORD_FILES = (PLAN, MISMATCH, STEPS, LEDGER)
RECORD_FOLDER = "fp16_patch"

STATES, OFFSET = ("state", "noise_floor"), "offset"
KEPT_STEPS = 2000
"""Of a longer run the summaries of so many steps are kept, evenly spread; totals are over all."""

WORST_TOKENS = 16
LISTED_PARTIAL_STEPS = 5

FLOAT32_BY_DESIGN = frozenset({*STAYS_FP32, "wire", "logits"})
_MAY_BE_FLOAT32 = FLOAT32_BY_DESIGN.union(COMPUTE_OR_FP32)
# verl's and OpenRLHF's names for the mean reward of a step.
REWARDS = ("critic/score/mean", "rollout/reward_mean")

Ledger = dict[str, dict[str, list[str]]]
Runs = Mapping[str, "RunRecord"]


@dataclass(frozen=True)
class Episode:
    """An alert from the step it is about to the last one at which it stood."""

    alert: StandingAlert
    until: int
    standing: bool


@dataclass(frozen=True)
class RunRecord:
    """One run as it was recorded; what is mapped by step is in the order of steps.

    Attributes:
        steps, mismatch: the metrics of each step, from the two files.
        stats: the mismatch of all steps, merged.
        step_stats: the mismatch of each step, of at most ``KEPT_STEPS`` steps.
        worst: (step, token) of the largest finite |d|, largest first.
        noise_floor: the learner against itself, merged; None where it was not measured.
        attempts: the starts of the trainer that wrote the record. ``starts``: the first step that each of them wrote.
    """

    path: Path
    plan: dict[str, Any]
    ledger: Ledger
    processes: int
    steps: dict[int, dict[str, float]]
    mismatch: dict[int, dict[str, float]]
    stats: MismatchStats
    wall_s: float | None
    notes: list[str] = field(default_factory=list)
    step_stats: dict[int, MismatchStats] = field(default_factory=dict)
    worst: list[tuple[int, WorstToken]] = field(default_factory=list)
    noise_floor: MismatchStats | None = None
    coverage: dict[int, Coverage] = field(default_factory=dict)
    alerts: dict[int, tuple[StandingAlert, ...]] = field(default_factory=dict)
    attempts: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def total(self) -> MismatchStats:
        """Return the mismatch of all steps, merged."""
        return self.stats

    def series(self, metric: str) -> dict[int, float]:
        """Return the metric's finite values by step, wherever it was recorded."""
        merged = {step: self.steps.get(step, {}) | self.mismatch.get(step, {}) for step in self.recorded_steps()}
        values = {step: metrics.get(metric, math.nan) for step, metrics in merged.items()}
        return {step: value for step, value in values.items() if math.isfinite(value)}

    def recorded_steps(self) -> list[int]:
        return sorted(self.steps.keys() | self.mismatch.keys())

    def summary(self) -> dict[str, Any]:
        """Return what a run comes to; means are over all tokens of all steps, NaN where nothing was recorded."""
        totals = self.total().metrics(prefix="")
        scales = list(self.series("fp16/loss_scale").values())
        return {
            "steps": len(self.recorded_steps()),
            "tokens": self.total().tokens,
            "wall_s": self.wall_s,
            "reward": [reward for name in REWARDS for reward in self.series(name).values()],
            "loss_scale": scales[-1] if scales else None,
            "skipped": int(max(self.series("fp16/skipped_total").values(), default=0)),
            "ledger": self.ledger,
            "mismatch": {
                name: totals[name] for name in ("mean_abs", "max_abs", "seq_mean_abs", "k1", "k3", "prob_mean_abs")
            },
        }

    def over_floor(self) -> float:
        """Return mean |d| as a multiple of the learner's against itself; NaN where that was not measured, or is 0."""
        floor = self.noise_floor.metrics(prefix="")["mean_abs"] if self.noise_floor is not None else math.nan
        return self.total().metrics(prefix="")["mean_abs"] / floor if floor else math.nan

    def covered(self) -> float:
        """Return the share of the sampled tokens that was measured; NaN where it was not recorded."""
        known = [(part.tokens, part.expected_tokens) for part in self.coverage.values() if part.expected_tokens]
        return sum(tokens for tokens, _ in known) / sum(expected for _, expected in known) if known else math.nan

    def episodes(self) -> list[Episode]:
        """Return the alerts in the order in which they began, with the values at the last step at which they stood."""
        last = {(alert.name, alert.since): (alert, step) for step, alerts in self.alerts.items() for alert in alerts}
        end = max(self.mismatch, default=0)
        episodes = [Episode(alert, step, standing=step == end) for alert, step in last.values()]
        return sorted(episodes, key=lambda episode: (episode.alert.since, episode.alert.name))

    def planned_dtype(self) -> str | None:
        """Return the dtype that the plan asks for, by torch's name; None if no plan was recorded."""
        dtype = self.plan.get("dtype")
        return None if dtype is None else torch_name(dtype)

    def dtypes_of(self, quantities: Iterable[str], role_prefix: str = "") -> list[str]:
        """Return the dtypes of the first of ``quantities`` seen in roles whose names begin so."""
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
        """Return the dtypes seen in the role, apart from what is float32 by design."""
        row = self.ledger.get(role, {})
        return sorted({dtype for quantity in row.keys() - FLOAT32_BY_DESIGN for dtype in row[quantity]})

    def deviations(self) -> list[tuple[str, str, list[str]]]:
        """Return (role, quantity, dtypes) wherever a dtype was seen that the plan does not allow."""
        return [
            (role, quantity, dtypes)
            for role, row in self.ledger.items()
            for quantity, dtypes in row.items()
            if self.deviates(quantity, dtypes)
        ]

    def deviates(self, quantity: str, dtypes: Iterable[str]) -> bool:
        planned = self.planned_dtype()
        allowed = {planned, "float32"} if quantity in _MAY_BE_FLOAT32 else {planned}
        return planned is not None and not set(dtypes) <= allowed


def load_run(path: str | Path) -> RunRecord:
    """Read the record at ``path``, in its folder ``fp16_patch``, or in that of the one run right below it.

    A killed run leaves some of the files; what is there is read, what is missing is noted.
    Unreadable lines are left out and noted; of lines with the same step (a resumed run) the last one counts.

    Raises:
        FileNotFoundError: none of them holds any file of a record, or several runs lie right below.
    """
    folder = record_folder(Path(path))
    notes = [f"{name} is missing" for name in RECORD_FILES if not (folder / name).is_file()]
    ledger = _read_object(folder / LEDGER, notes)
    steps = _read_lines(folder / STEPS, notes)
    mismatch = _read_lines(folder / MISMATCH, notes)
    states = _read_states(folder / MISMATCH, mismatch, notes)
    coverage = {step: part for step, line in mismatch.items() if (part := coverage_of(line)) is not None}
    return RunRecord(
        path=folder,
        plan=_read_object(folder / PLAN, notes),
        ledger=_merge_roles(ledger),
        processes=len(ledger.get("processes", [])),
        steps={step: metrics_of(line) for step, line in steps.items()},
        mismatch={step: metrics_of(line) for step, line in mismatch.items()},
        stats=states.total,
        wall_s=_wall_seconds([*(steps or mismatch).values()]),
        notes=notes + _coverage_notes(coverage),
        step_stats=states.kept,
        worst=states.worst,
        noise_floor=states.noise_floor,
        coverage=coverage,
        alerts={step: alerts for step, line in mismatch.items() if (alerts := alerts_of(line))},
        attempts=_attempts([*mismatch.values(), *steps.values()]),
        starts=_starts([*mismatch.values(), *steps.values()]),
    )


def worst_of(tokens: Iterable[tuple[int, WorstToken]]) -> list[tuple[int, WorstToken]]:
    """Return the (step, token) of the largest |d|, largest first."""
    return sorted(tokens, key=lambda pair: -abs(pair[1].d))[:WORST_TOKENS]


def record_folder(path: Path) -> Path:
    """Return the folder that holds a run's record files: `path`, `fp16_patch` in it, or the only such one level down.

    Raises:
        FileNotFoundError: there is no record, or several runs lie right below; the message lists them.
    """
    if (found := _record_in(path)) is not None:
        return found
    # verl's record lies in its checkpoints' folder, below the one that a user gives a run.
    below = [found for folder in _folders_in(path) if (found := _record_in(folder)) is not None]
    if len(below) == 1:
        return below[0]
    if below:
        raise FileNotFoundError(f"{path} holds several runs: {_listed_runs(below)}. Fix: name those you mean")
    where = f"{path} and {path / RECORD_FOLDER}, and likewise in each folder of {path}"
    raise FileNotFoundError(
        f"no run record: looked for {', '.join(RECORD_FILES)} in {where}. "
        "Give the record directory of a run that had fp16_patch active, or its parent."
    )


def _record_in(folder: Path) -> Path | None:
    places = (folder, folder / RECORD_FOLDER)
    return next((place for place in places if any((place / name).is_file() for name in RECORD_FILES)), None)


def _folders_in(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []


def _listed_runs(records: Sequence[Path], most: int = 8) -> str:
    runs = [str(record.parent if record.name == RECORD_FOLDER else record) for record in records]
    return ", ".join(runs[:most]) + (f" and {len(runs) - most} more" if len(runs) > most else "")


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


def _read_lines(path: Path, notes: list[str]) -> dict[int, Line]:
    """Return the last line of each step, without its states: their place in the file instead, as ``OFFSET``."""
    if not path.is_file():
        return {}
    by_step: dict[int, Line] = {}
    unreadable, cut_off = 0, False
    for offset, text in _lines_at(path):
        line = parse_line(text)
        unreadable, cut_off = unreadable + cut_off, line is None
        if line is not None:
            by_step[line["step"]] = {key: value for key, value in line.items() if key not in STATES} | {OFFSET: offset}
    if cut_off:
        notes.append(f"{path.name}: the last line is cut off, and left out")
    if unreadable:
        notes.append(f"{path.name}: {unreadable} unreadable lines left out")
    return dict(sorted(by_step.items()))


def _lines_at(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, each with its place in the file, in bytes."""
    offset = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield offset, line
            offset += len(line)


def _attempts(lines: Iterable[Line]) -> list[str]:
    """Return the starts of the trainer, in the order of the steps they wrote."""
    return list(dict.fromkeys(str(line["attempt"]) for line in lines if line.get("attempt")))


def _starts(lines: Iterable[Line]) -> list[int]:
    """Return the first step that is left of each start of the trainer."""
    firsts: dict[str, int] = {}
    for line in lines:
        if attempt := line.get("attempt"):
            firsts[str(attempt)] = min(line["step"], firsts.get(str(attempt), line["step"]))
    return sorted(set(firsts.values()))


def _coverage_notes(coverage: Mapping[int, Coverage]) -> list[str]:
    partial = [f"step {step}: {part.text()}" for step, part in coverage.items() if not part.complete]
    more = len(partial) - LISTED_PARTIAL_STEPS
    return partial[:LISTED_PARTIAL_STEPS] + ([f"{more} more steps are partly covered"] if more > 0 else [])


@dataclass
class _States:
    """What the states of all lines come to, read one line at a time."""

    kept: dict[int, MismatchStats] = field(default_factory=dict)
    worst: list[tuple[int, WorstToken]] = field(default_factory=list)
    total: MismatchStats = field(default_factory=MismatchStats.empty)
    noise_floor: MismatchStats | None = None

    def add(self, step: int, line: Line, keep: bool) -> None:
        state = MismatchStats.from_dict(line["state"])
        self.total += state
        self.worst = worst_of([*self.worst, *((step, token) for token in state.worst_tokens())])
        if keep:
            self.kept[step] = state
        if line.get("noise_floor"):
            floor = MismatchStats.from_dict(line["noise_floor"])
            self.noise_floor = floor if self.noise_floor is None else self.noise_floor + floor


def _read_states(path: Path, lines: Mapping[int, Line], notes: list[str]) -> _States:
    states = _States()
    if not lines:
        return states
    kept = set([*lines][:: math.ceil(len(lines) / KEPT_STEPS)])
    with path.open("rb") as file:
        for step, line in lines.items():
            file.seek(line[OFFSET])
            try:
                states.add(step, parse_line(file.readline()) or {}, step in kept)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                notes.append(f"{MISMATCH}: step {step} is not in the totals: {error!r}")
    return states


def _merge_roles(ledger: dict[str, Any]) -> Ledger:
    tables = [ledger["roles"]] if ledger.get("roles") else [row.get("roles", {}) for row in ledger.get("processes", [])]
    merged: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for table in tables:
        for role, row in table.items():
            for quantity, dtypes in row.items():
                merged[role][quantity] |= {torch_name(dtype) for dtype in dtypes}
    return {role: {quantity: sorted(seen) for quantity, seen in row.items()} for role, row in merged.items()}


def _wall_seconds(lines: Sequence[Line]) -> float | None:
    times = [line["time"] for line in lines if isinstance(line.get("time"), int | float)]
    return max(times) - min(times) if times else None
