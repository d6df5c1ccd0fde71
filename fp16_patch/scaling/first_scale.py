"""A run's first loss scale, from the gradients of its first mini-batch: nothing overflows while the scale looks for it.

The mini-batch is computed once before it is trained on, its gradients are looked at and thrown away.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.optimizer_step import WatchedEngine
from fp16_patch.scaling.retry import RandomState, everywhere
from fp16_patch.scaling.scaler import GRADIENT_MARGIN, LARGEST_SCALE, fitting_scale
from fp16_patch.scaling.tensor_range import Extent, largest_gradient

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MEASURING = "_fp16_patch_measuring"
# From above: a small scale would hide what it makes vanish. Of a model that bears the largest, one pass is enough.
_TRIED = (LARGEST_SCALE, 256.0, 1.0)


def measuring(engine: Any) -> bool:
    """Whether what the engine computes now is not to be stepped on."""
    return getattr(engine, _MEASURING, False)


def measure(
    step: WatchedEngine, random: RandomState, compute: Callable[[], T], forward_was_finite: Callable[[T], bool]
) -> None:
    """Set the scale that the first mini-batch's gradients bear, with a margin, on every rank the same.

    Args:
        step: the engine that will step.
        random: the generators as they are to be before `compute`, and afterwards.
        compute: the update, of which the engine skips the step while `measuring`.
        forward_was_finite: of what that gives. Otherwise the mini-batch says nothing about the scale.
    """
    for tried in _TRIED:
        reach, finite = _reach_at(tried, step, compute, forward_was_finite)
        random.restore()
        if not finite:
            return _start_at(current_plan().init_scale, step, "loss is not finite; without a measurement")
        if math.isfinite(reach):
            break
    else:
        return _start_at(current_plan().init_scale, step, "gradients are finite at no scale; without a measurement")
    fitting = fitting_scale(torch.finfo(torch.float16).max / reach if reach else math.inf)
    finding = f"largest gradient is {reach:.3g}; with room for one {GRADIENT_MARGIN:g} times as large"
    return _start_at(max(fitting, current_plan().min_scale), step, finding)


def _start_at(scale: float, step: WatchedEngine, finding: str) -> None:
    step.set_loss_scale(scale)
    if torch.distributed.get_rank() == 0:
        logger.warning("%s: the first mini-batch's %s, the loss scale starts at %g", step.role, finding, scale)


def _reach_at(
    scale: float, step: WatchedEngine, compute: Callable[[], T], forward_was_finite: Callable[[T], bool]
) -> tuple[float, bool]:
    """The largest gradient of any rank, unscaled, and whether the forward pass was finite on all."""
    step.set_loss_scale(scale)
    setattr(step.engine, _MEASURING, True)
    try:
        with Extent(step.module()) as extent:
            result = compute()
    finally:
        setattr(step.engine, _MEASURING, False)
    own = largest_gradient(extent.largest(), current_plan().torch_dtype) / scale
    of_ranks = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, own)
    return max(of_ranks), everywhere(forward_was_finite(result))
