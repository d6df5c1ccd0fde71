"""What a framework reports of its optimizer steps: no norm of a skipped one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.scaler import StepOutcome


def report_taken_norms(
    metrics: dict[str, Any],
    name: str,
    outcomes: Sequence[StepOutcome],
    reduce: Callable[[list[float]], Any] = list,
) -> None:
    """Let a metric tell of the gradient norms of the steps that were taken; where none was, drop it.

    Args:
        name: of the metric in which the framework reports its norms, those of skipped steps included.
        outcomes: of the steps that it tells of.
        reduce: makes the metric of the norms, as the framework does.
    """
    if not current_plan().overrides_dtype:
        return
    reported = metrics.pop(name, None)
    norms = [outcome.grad_norm for outcome in outcomes if not outcome.skipped and math.isfinite(outcome.grad_norm)]
    if norms and reported is not None:
        metrics[name] = reduce(norms)
