"""When the loss scale may grow: torch's scaler grows it until it breaks; here it first looks at the gradients.

torch's rule (`torch/amp/grad_scaler.py`): after `growth_interval` steps without an overflow, scale ← scale ·
growth_factor. `scale_rule=ahead` adds: if the largest gradient seen in these steps still fits FP16 then, with `MARGIN`
to spare. If it does not, the scaler counts its steps anew.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import torch

from fp16_patch.runtime.activation import current_plan
from fp16_patch.runtime.torch_private import steps_since_growth
from fp16_patch.scaling.tensor_range import FP16_MAX

logger = logging.getLogger(__name__)

MARGIN = 2.0
"""The scale grows only if gradients so many times as large as those that were seen would still fit."""


def fits_at_scale(largest: float, scale: float) -> bool:
    """Return whether gradients so large, unscaled, fit FP16 at this scale: largest · scale · `MARGIN` ≤ 65504."""
    return bool(largest * scale * MARGIN <= FP16_MAX)


class GradMaxWindow:
    """The largest unscaled |gradient| of each update that was looked at, by the number of its optimizer step."""

    def __init__(self) -> None:
        self._by_step: deque[tuple[int, float]] = deque()

    def add(self, step: int, largest: float) -> None:
        self._by_step.append((step, largest))

    def largest(self, since: int) -> float | None:
        """Return the largest from this step on, and forget those before; None without any."""
        while self._by_step and self._by_step[0][0] < since:
            self._by_step.popleft()
        return max((largest for _, largest in self._by_step), default=None)


def wants_gradient_stats(scaler: Any, attempted: int) -> bool:
    """Return whether to look at the next update: at every so many, and at the last before the scale might grow.

    Args:
        scaler: torch's.
        attempted: optimizer steps so far.
    """
    plan = current_plan()
    if plan.gradient_look_every and attempted % plan.gradient_look_every == 0:
        return True
    return plan.scale_rule == "ahead" and steps_since_growth(scaler) >= scaler.get_growth_interval() - 2


def maybe_hold_growth(scaler: Any, window: GradMaxWindow, attempted: int, role: str) -> None:
    """Hold the scale before an update with which it would grow, unless recent gradients would fit.

    Args:
        scaler: torch's.
        window: of the updates before.
        attempted: optimizer steps so far.
        role: of the engine, for the log.
    """
    interval = scaler.get_growth_interval()
    if current_plan().scale_rule != "ahead" or steps_since_growth(scaler) < interval - 1:
        return
    scale = float(scaler.get_scale())
    largest = window.largest(since=attempted - interval + 1)
    if largest is None:
        # A resumed run has seen nothing yet: this update is looked at, the next one asks again.
        set_growth_count(scaler, interval - 2)
    elif not fits_at_scale(largest, scale * scaler.get_growth_factor()):
        # So that after this update it is 0, as if the scale had grown.
        set_growth_count(scaler, -1)
        if torch.distributed.get_rank() == 0:
            seen = largest * scale
            logger.debug("%s: the loss scale stays at %g: gradients reach %.3g of %g", role, scale, seen, FP16_MAX)


def set_growth_count(scaler: Any, steps: int) -> None:
    """Let a scaler count so many steps since its scale last changed: at `growth_interval` it grows."""
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": steps})
