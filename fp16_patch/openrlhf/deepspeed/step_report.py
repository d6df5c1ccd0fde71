"""What OpenRLHF's status says of a learner's optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fp16_patch.openrlhf.deepspeed.step import DeepSpeedStep
from fp16_patch.scaling.step_report import report_taken_norms


def train_and_report(role: str, prefix: str, engine: Any, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Train, and add what became of the optimizer steps to OpenRLHF's status; `step_skipped` is the share skipped.

    Args:
        prefix: of the metrics' names, instead of `fp16/`.
        train: returns the status.
    """
    step = DeepSpeedStep.of(engine)
    retries_before = step.history.retries_total
    with step.recording() as steps:
        status = train()
    outcomes = [recorded.outcome for recorded in steps]
    skipped = sum(outcome.skipped for outcome in outcomes)
    of_this_call = {
        "fp16/step_skipped": skipped / len(steps) if steps else 0.0,
        "fp16/retries": float(step.history.retries_total - retries_before),
    }
    metrics = {name: of_this_call.get(name, value) for name, value in step.metrics().items()}
    status.update({prefix + name.removeprefix("fp16/"): value for name, value in metrics.items()})
    if skipped:
        # DeepSpeed repeats the norm of the last step taken, 0 if there was none. Up to 0.9.5 it is not in the status.
        report_taken_norms(status, f"{role}_grad_norm", outcomes, reduce=_last if role == "actor" else _mean)
    return status


# OpenRLHF reports the actor's last norm and the critic's mean.
def _last(norms: list[float]) -> float:
    return norms[-1]


def _mean(norms: list[float]) -> float:
    return float(torch.tensor(norms).mean())
