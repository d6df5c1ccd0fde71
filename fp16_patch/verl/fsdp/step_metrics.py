"""What verl's metrics say of optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fp16_patch.scaling.optimizer_step import RecordedStep
from fp16_patch.scaling.step_report import report_taken_norms

_REDUCTIONS = {
    "fp16/loss_scale": "/min",
    "fp16/skipped_total": "/max",
    "fp16/consecutive_skips": "/max",
    "fp16/retries": "/max",
    "fp16/retries_total": "/max",
}


def reducible(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return `fp16/*` metrics of a step under names that verl reduces in the right way.

    verl reduces over mini-batches by name: a mean, unless the name says min or max.
    """
    return {name + _REDUCTIONS.get(name, ""): value for name, value in metrics.items()}


def add_steps(metrics: dict[str, Any], role: str, steps: Sequence[RecordedStep]) -> None:
    """Append the outcomes of an update's steps to the lists that verl reduces; skipped steps' norms are left out."""
    report_taken_norms(metrics, f"{role}/grad_norm", [step.outcome for step in steps])
    for step in steps:
        for name, value in reducible(step.metrics).items():
            metrics.setdefault(f"{role}/{name}", []).append(value)
