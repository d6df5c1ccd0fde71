"""Makes a run record of a dump of log-probs, as if the run had been monitored."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.record.reading import MISMATCH, PLAN, RECORD_FILES, RunRecord
from fp16_patch.mismatch.record.step_metrics import StepMetrics
from fp16_patch.mismatch.report.comparison import OFFLINE
from fp16_patch.mismatch.report.dump import read_dump
from fp16_patch.mismatch.statistics.summary import MismatchStats


def analyze(path: Path, sampler_key: str | None = None, learner_key: str | None = None) -> RunRecord:
    """Make a record of a dump; see ``read_dump`` for its form, the keys and what is raised."""
    steps = read_dump(path, sampler_key, learner_key)
    return RunRecord(
        path=path,
        plan={"mode": OFFLINE, "source": str(path)},
        mismatch=StepMetrics.of({step: stats.metrics() for step, stats in steps.items()}, steps.numbers),
        stats=MismatchStats.merge_all(steps.values()),
        notes=steps.notes,
        step_stats=steps,
        worst=steps.worst,
    )


def require_no_record(folder: Path) -> None:
    """Raise ``FileExistsError`` if the directory holds a record."""
    present = [name for name in RECORD_FILES if (folder / name).exists()]
    if present:
        raise FileExistsError(f"{folder} holds a record already ({', '.join(present)}). Give another directory")


def write_record(record: RunRecord, folder: Path) -> None:
    """Write the record where `fp16-patch report` reads it.

    Raises:
        FileExistsError: the directory holds a record already.
    """
    require_no_record(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_text(json.dumps(record.plan), encoding="utf-8")
    with (folder / MISMATCH).open("w", encoding="utf-8") as lines:
        for step, stats in record.step_stats.items():
            line = {"step": step, "metrics": stats.metrics(), "state": stats.to_dict()}
            lines.write(json.dumps(line) + "\n")


def figures(record: RunRecord) -> dict[str, Any]:
    """Return what was measured, JSON-able: all steps together, each step, the diagnosis. What is not finite is None."""
    return {
        "source": str(record.path),
        "metrics": _finite(record.total().metrics()),
        "steps": {str(step): _finite(stats.metrics()) for step, stats in record.step_stats.items()},
        "worst_tokens": [{"step": step, **asdict(token)} for step, token in record.worst],
        "diagnosis": [asdict(finding) for finding in diagnose_run(record)],
    }


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
