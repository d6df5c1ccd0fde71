"""Reads a run record, the directory that a monitored run leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.record.coverage import SHARE, CoveredSteps
from fp16_patch.mismatch.record.documents import Ledger, read_ledger, read_plan
from fp16_patch.mismatch.record.episodes import Episode, Episodes
from fp16_patch.mismatch.record.lines import Coverage, alerts_of, coverage_of, metrics_of
from fp16_patch.mismatch.record.progress import Progress
from fp16_patch.mismatch.record.states import States
from fp16_patch.mismatch.record.step_lines import MAX_LINE_BYTES, StepLines
from fp16_patch.mismatch.record.step_metrics import MOST_METRICS, StepMetrics
from fp16_patch.mismatch.statistics.summary import MismatchStats, WorstToken
from fp16_patch.plan.dtypes import COMPUTE_OR_FP32, STAYS_FP32, torch_name
from fp16_patch.untrusted.lines import without_collector
from fp16_patch.untrusted.paths import is_file, is_folder, reason_of
from fp16_patch.untrusted.reading import Unreadable, opened

PLAN, MISMATCH, STEPS, LEDGER = "plan.json", "mismatch.jsonl", "steps.jsonl", "ledger.json"
RECORD_FILES = (PLAN, MISMATCH, STEPS, LEDGER)
RECORD_FOLDER = "fp16_patch"

KEPT_STEPS = 2000
"""Of a longer run the summaries of so many steps are kept, evenly spread; totals are over all."""

FLOAT32_BY_DESIGN = frozenset({*STAYS_FP32, "wire", "logits"})
_MAY_BE_FLOAT32 = FLOAT32_BY_DESIGN.union(COMPUTE_OR_FP32)
# verl's and OpenRLHF's names for the mean reward of a step.
REWARDS = ("critic/score/mean", "rollout/reward_mean")

Runs = Mapping[str, "RunRecord"]


@dataclass(frozen=True)
class RunRecord:
    """One run as it was recorded; what is mapped by step is in the order of steps.

    Attributes:
        steps, mismatch: the metrics of each step, from the two files.
        stats: the mismatch of all steps, merged.
        step_stats: the mismatch of each step, of at most ``KEPT_STEPS`` steps.
        step_fresh: of these steps, those that know how old their samples' weights are, and their tokens of lag 0.
        by_lag: lag → the mismatch of all steps' tokens of that lag; empty where no step knows.
        worst: (step, token) of the largest finite |d|, largest first.
        noise_floor: the learner against itself, merged; None where it was not measured.
        alerts: in the order in which they began.
        attempts: the starts of the trainer that wrote the record. ``starts``: the first step that each of them wrote.
    """

    path: Path
    plan: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=dict)
    processes: int = 0
    steps: StepMetrics = field(default_factory=StepMetrics)
    mismatch: StepMetrics = field(default_factory=StepMetrics)
    stats: MismatchStats = field(default_factory=MismatchStats.empty)
    wall_s: float | None = None
    notes: list[str] = field(default_factory=list)
    step_stats: Mapping[int, MismatchStats] = field(default_factory=dict)
    step_fresh: Mapping[int, MismatchStats] = field(default_factory=dict)
    by_lag: Mapping[int, MismatchStats] = field(default_factory=dict)
    worst: list[tuple[int, WorstToken]] = field(default_factory=list)
    noise_floor: MismatchStats | None = None
    covered: CoveredSteps = field(default_factory=CoveredSteps)
    alerts: list[Episode] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def total(self) -> MismatchStats:
        """Return the mismatch of all steps, merged."""
        return self.stats

    def numerics(self) -> dict[int, MismatchStats]:
        """Return the mismatch of each step without drift: of tokens that were sampled with the learner's weights.

        A step that does not know how old its samples' weights are has all of its tokens.
        """
        return {step: self.step_fresh.get(step, stats) for step, stats in self.step_stats.items()}

    def series(self, metric: str) -> dict[int, float]:
        """Return the metric's finite values by step, wherever it was recorded; of many steps, those that are kept.

        At a step that both files have, the mismatch's own counts: a late report corrects it.
        """
        trained, measured = self.steps.series(metric), self.mismatch.series(metric)
        if not measured:
            return trained
        return dict(sorted(({step: x for step, x in trained.items() if step not in self.mismatch} | measured).items()))

    @property
    def coverage(self) -> dict[int, Coverage]:
        """Return how much of each step was measured, of the first steps of a long run."""
        return self.covered.by_step

    def recorded_steps(self) -> list[int]:
        return sorted({*self.steps, *self.mismatch})

    def summary(self) -> dict[str, Any]:
        """Return what a run comes to; means are over all tokens of all steps, NaN where nothing was recorded.

        ``mismatch_by_lag`` is empty where nobody knows how old the samples' weights are.
        """
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
            "mismatch_by_lag": {
                str(lag): {"tokens": stats.tokens, "mean_abs": stats.metrics(prefix="")["mean_abs"]}
                for lag, stats in self.by_lag.items()
            },
        }

    def over_floor(self) -> float:
        """Return mean |d| without drift as a multiple of the learner's against itself; NaN where one is not known."""
        floor = self.noise_floor.metrics(prefix="")["mean_abs"] if self.noise_floor is not None else math.nan
        # Drift is not the learner's doing.
        compared = self.by_lag.get(0, MismatchStats.empty()) if self.by_lag else self.total()
        return compared.metrics(prefix="")["mean_abs"] / floor if floor else math.nan

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

    A killed run leaves some of the files; what is there is read, what is missing is noted. The files may hold anything:
    unreadable lines and fields are left out and noted, as is a whole file. Of lines with the same step (a resumed run)
    the last one counts. What is held of a run does not grow with its steps, but for their numbers.

    Raises:
        FileNotFoundError: none of them holds any file of a record, or several runs lie right below.
    """
    folder = record_folder(Path(path))
    notes = [f"{name} is missing" for name in RECORD_FILES if not is_file(folder / name)]
    ledger, processes = read_ledger(folder / LEDGER, notes)
    mismatch = _Mismatch()
    with without_collector():
        steps, trained = _read_steps(folder / STEPS, notes)
        mismatch.read(folder / MISMATCH, notes)
    starts = _first_of(mismatch.progress.starts, trained.starts)
    return RunRecord(
        path=folder,
        plan=read_plan(folder / PLAN, notes),
        ledger=ledger,
        processes=processes,
        steps=steps,
        mismatch=mismatch.metrics,
        stats=mismatch.states.total(),
        wall_s=(trained if len(steps) else mismatch.progress).wall_s,
        notes=notes + mismatch.covered.notes(),
        step_stats=mismatch.states.kept,
        step_fresh=mismatch.states.fresh,
        by_lag=mismatch.states.by_lag(),
        worst=mismatch.states.worst,
        noise_floor=mismatch.states.noise_floor,
        covered=mismatch.covered,
        alerts=mismatch.episodes.until(max(mismatch.metrics, default=0)),
        attempts=[*starts],
        starts=sorted({*starts.values()}),
    )


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
    return next((place for place in places if any(is_file(place / name) for name in RECORD_FILES)), None)


def _folders_in(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if is_folder(folder)) if is_folder(path) else []


def _listed_runs(records: Sequence[Path], most: int = 8) -> str:
    runs = [str(record.parent if record.name == RECORD_FOLDER else record) for record in records]
    return ", ".join(runs[:most]) + (f" and {len(runs) - most} more" if len(runs) > most else "")


class _Mismatch:
    """What the lines of the mismatch come to."""

    def __init__(self) -> None:
        self.metrics, self.progress, self.states = StepMetrics(), Progress(), States(1)
        self.covered, self.episodes = CoveredSteps(), Episodes()

    def read(self, path: Path, notes: list[str]) -> None:
        with _step_lines(path, notes) as lines:
            self.states = States(math.ceil(len(lines) / KEPT_STEPS) or 1)
            for line in lines:
                coverage, share = coverage_of(line), {}
                if coverage is not None:
                    self.covered.add(line["step"], coverage)
                    share = {SHARE: coverage.share()}
                self.metrics.add(line["step"], metrics_of(line) | share)
                self.progress.add(line)
                self.episodes.add(line["step"], alerts_of(line))
                self.states.add(line)
        notes += _metrics_notes(path, self.metrics) + self.states.notes(path.name)
        if self.episodes.left_out:
            notes.append(f"{path.name}: too many alerts, {self.episodes.left_out} left out")


def _read_steps(path: Path, notes: list[str]) -> tuple[StepMetrics, Progress]:
    metrics, progress = StepMetrics(), Progress()
    with _step_lines(path, notes) as lines:
        for line in lines:
            metrics.add(line["step"], metrics_of(line))
            progress.add(line)
    notes += _metrics_notes(path, metrics)
    return metrics, progress


@contextmanager
def _step_lines(path: Path, notes: list[str]) -> Iterator[StepLines | tuple[()]]:
    """Open a file for its lines, none where it is missing or cannot be read; note at the end what was left out."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(opened(path)) if is_file(path) else None
        except (OSError, Unreadable) as problem:
            notes.append(f"{path.name} cannot be read, and is left out: {reason_of(problem)}")
            file = None
        if file is None:
            yield ()
            return
        lines = StepLines(file)
        yield lines
    if lines.cut_off:
        notes.append(f"{path.name}: the last line is cut off, and left out")
    if lines.unreadable:
        notes.append(f"{path.name}: {lines.unreadable} unreadable lines left out")
    if lines.too_long:
        notes.append(f"{path.name}: {lines.too_long} lines of more than {MAX_LINE_BYTES >> 20} MiB left out")


def _metrics_notes(path: Path, metrics: StepMetrics) -> list[str]:
    return [f"{path.name}: metrics beyond the first {MOST_METRICS} are left out"] if metrics.left_out else []


def _first_of(*starts: Mapping[str, int]) -> dict[str, int]:
    """Return each start of the trainer with its first step in any of the files."""
    every = dict.fromkeys(attempt for each in starts for attempt in each)
    return {attempt: min(each[attempt] for each in starts if attempt in each) for attempt in every}
