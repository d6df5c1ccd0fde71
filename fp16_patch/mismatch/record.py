"""Reading a run record, the directory that a monitored run leaves."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.stats import MismatchStats

PLAN, MISMATCH, STEPS, LEDGER = "plan.json", "mismatch.jsonl", "steps.jsonl", "ledger.json"
RECORD_FILES = (PLAN, MISMATCH, STEPS, LEDGER)
RECORD_FOLDER = "fp16_patch"

FLOAT32_BY_DESIGN = frozenset({"master", "gradient", "wire", "logits", "log_prob", "entropy", "rope"})
# verl's and OpenRLHF's names for the mean reward of a step.
REWARDS = ("critic/score/mean", "rollout/reward_mean")
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
            "reward": [reward for name in REWARDS for reward in self.series(name).values()],
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

    A killed run leaves some of the files; what is there is read, what is missing is noted.
    Unreadable lines are left out and noted; of lines with the same step (a resumed run) the last one counts.

    Raises:
        FileNotFoundError: neither directory holds any file of a record.
    """
    folder = _record_folder(Path(path))
    notes = [f"{name} is missing" for name in RECORD_FILES if not (folder / name).is_file()]
    ledger = _read_object(folder / LEDGER, notes)
    steps = _read_lines(folder / STEPS, notes)
    mismatch = _read_lines(folder / MISMATCH, notes)
    return RunRecord(
        path=folder,
        plan=_read_object(folder / PLAN, notes),
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
            notes.append(f"{MISMATCH}: step {step} is not in the totals: {error!r}")
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
