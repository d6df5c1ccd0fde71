"""Whether the loss scale may grow: torch's scaler grows it until it breaks; here the gradients are asked before.

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
from fp16_patch.scaling.gradient_stats import FP16_MAX, Figures
from fp16_patch.scaling.optimizer_step import WatchedEngine

logger = logging.getLogger(__name__)

_SEEN = "_fp16_patch_seen"

MARGIN = 2.0
"""A scale is grown to only if gradients so many times as large as those that were seen would still fit."""


def bears(largest: float, scale: float) -> bool:
    """Whether gradients that are so large, unscaled, fit FP16 at this scale: largest · scale · `MARGIN` ≤ 65504."""
    return bool(largest * scale * MARGIN <= FP16_MAX)


class Seen:
    """The largest unscaled gradient of each update that was looked at, by the number of its optimizer step."""

    def __init__(self) -> None:
        self._by_step: deque[tuple[int, float]] = deque()

    def add(self, step: int, largest: float) -> None:
        self._by_step.append((step, largest))

    def largest(self, since: int) -> float | None:
        """From this step on; None without a look."""
        while self._by_step and self._by_step[0][0] < since:
            self._by_step.popleft()
        return max((largest for _, largest in self._by_step), default=None)


def wants_look(step: WatchedEngine, scaler: Any) -> bool:
    """Whether the next update is looked at: every so many, and the last before the scale might grow."""
    plan = current_plan()
    if plan.gradient_look_every and step.history.attempted % plan.gradient_look_every == 0:
        return True
    return plan.scale_rule == "ahead" and counted(scaler) >= scaler.get_growth_interval() - 2


def learn(step: WatchedEngine, figures: Figures | None) -> None:
    """Keep what an update that was looked at has shown."""
    if figures is not None:
        seen_of(step.engine).add(step.history.attempted, figures.unscaled)


def hold_back(step: WatchedEngine, scaler: Any) -> None:
    """Before an update with which the scale would grow: let it only if the gradients bear that."""
    interval = scaler.get_growth_interval()
    if current_plan().scale_rule != "ahead" or counted(scaler) < interval - 1:
        return
    scale = step.loss_scale()
    assert scale is not None
    grown = scale * scaler.get_growth_factor()
    largest = seen_of(step.engine).largest(since=step.history.attempted - interval + 1)
    if largest is None:
        # A resumed run has seen nothing yet: this update is looked at, the next one asks again.
        count_from(scaler, interval - 2)
    elif not bears(largest, grown):
        # So that after this update it is 0, as if the scale had grown.
        count_from(scaler, -1)
        if torch.distributed.get_rank() == 0:
            logger.debug(
                "%s: the loss scale stays at %g: gradients reach %.3g of %g",
                step.role,
                scale,
                largest * scale,
                FP16_MAX,
            )


def counted(scaler: Any) -> int:
    """Steps since the scale last changed, or was held: at `growth_interval` it grows."""
    return int(scaler._get_growth_tracker())


def count_from(scaler: Any, steps: int) -> None:
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": steps})


def forget(engine: Any) -> None:
    """The engine's steps are counted from elsewhere: what was seen at others says nothing."""
    setattr(engine, _SEEN, Seen())


def seen_of(engine: Any) -> Seen:
    if not hasattr(engine, _SEEN):
        setattr(engine, _SEEN, Seen())
    return getattr(engine, _SEEN)  # type: ignore[no-any-return]
