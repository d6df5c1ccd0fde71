"""A run's first loss scale, from the gradients of its first mini-batch, so that no step is lost to looking for it.

The mini-batch is computed once before it is trained on; those gradients are thrown away.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.random_state import RandomState
from fp16_patch.scaling.ranks import all_ranks, gather
from fp16_patch.scaling.retry import RepeatableUpdate
from fp16_patch.scaling.scaler import GRADIENT_MARGIN, LARGEST_SCALE, fitting_scale
from fp16_patch.scaling.tensor_range import FP16_MAX, AbsMaxHooks, largest_gradient

logger = logging.getLogger(__name__)

T = TypeVar("T")
# From above: a small scale would hide what it makes vanish. Where the largest fits, one pass is enough.
_TRIED = (LARGEST_SCALE, 256.0, 1.0)


def measure_first_scale(
    update: RepeatableUpdate, random: RandomState, compute: Callable[[], T], forward_was_finite: Callable[[T], bool]
) -> None:
    """Set the scale at which the first mini-batch's gradients fit FP16 with a margin, the same on every rank.

    Args:
        update: of the engine that will step.
        random: the generators as they are to be before `compute`, and afterwards.
        compute: computes the update without its step.
        forward_was_finite: of what that returns. Otherwise the mini-batch says nothing about the scale.
    """
    for tried in _TRIED:
        largest, finite = _largest_gradient_at(tried, update, compute, forward_was_finite)
        random.restore()
        if not finite:
            return _start_at(current_plan().init_scale, update, "loss is not finite; without a measurement")
        if math.isfinite(largest):
            break
    else:
        return _start_at(current_plan().init_scale, update, "gradients are finite at no scale; without a measurement")
    fitting = fitting_scale(FP16_MAX / largest if largest else math.inf)
    finding = f"largest gradient is {largest:.3g}; with room for one {GRADIENT_MARGIN:g} times as large"
    return _start_at(max(fitting, current_plan().min_scale), update, finding)


def _start_at(scale: float, update: RepeatableUpdate, finding: str) -> None:
    update.set_loss_scale(scale)
    if torch.distributed.get_rank() == 0:
        logger.warning("%s: the first mini-batch's %s, the loss scale starts at %g", update.role, finding, scale)


def _largest_gradient_at(
    scale: float, update: RepeatableUpdate, compute: Callable[[], T], forward_was_finite: Callable[[T], bool]
) -> tuple[float, bool]:
    """Return the largest gradient of any rank, unscaled, and whether the forward pass was finite on all."""
    update.set_loss_scale(scale)
    with AbsMaxHooks(update.module()) as hooks:
        result = compute()
    own = largest_gradient(hooks.largest(), current_plan().torch_dtype) / scale
    return max(gather(own)), all_ranks(forward_was_finite(result))
