"""An optimizer step as every framework takes it under the plan: allowed, watched, recorded, and stopped at a collapse.

What differs between frameworks is how a step is taken and how one sees that it was skipped: `WatchedEngine`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any

import torch

from fp16_patch import census
from fp16_patch.activation import current_plan
from fp16_patch.errors import LossScaleCollapse
from fp16_patch.scaling import StepHistory, StepOutcome, collapse_reason

logger = logging.getLogger(__name__)

_HISTORY = "_fp16_patch_history"


def history_of(engine: Any) -> StepHistory:
    """A framework engine's record of its optimizer steps."""
    if not hasattr(engine, _HISTORY):
        setattr(engine, _HISTORY, StepHistory())
    return getattr(engine, _HISTORY)  # type: ignore[no-any-return]


def share_history(engine: Any, other: Any) -> None:
    """Let another object of the framework have the record of an engine's steps, too."""
    setattr(other, _HISTORY, history_of(engine))


class WatchedEngine(ABC):
    """One optimizer step of a framework's engine.

    Args:
        engine: the framework's object, which keeps the history.
        role: `actor` or `critic`.
    """

    def __init__(self, engine: Any, role: str) -> None:
        self.engine, self.role = engine, role
        self.history = history_of(engine)

    @abstractmethod
    def loss_scale(self) -> float | None:
        """The scale in force; None without a scaler."""

    @abstractmethod
    def take(self) -> float:
        """Take the step as the framework does; the norm of the unscaled gradients."""

    @abstractmethod
    def was_skipped(self, scale_before: float | None, scale_after: float | None, grad_norm: float) -> bool:
        """Whether the step was not taken."""

    @abstractmethod
    def nonfinite(self) -> list[str]:
        """The first parameters with non-finite gradients on this rank, asked before the step."""

    def step(self) -> StepOutcome:
        """Take the step if the driver allows it.

        Raises:
            PrecisionError: the driver never judged the job.
            LossScaleCollapse: skips do not end; on every rank.
        """
        census.require_clearance()
        scale = self.loss_scale()
        # Looked for before the step: clipping by a NaN norm makes every gradient NaN.
        culprits = self.nonfinite() if self._may_collapse(scale) else []
        grad_norm = self.take()
        after = self.loss_scale()
        outcome = StepOutcome(after, self.was_skipped(scale, after, grad_norm), grad_norm)
        self.history.add(outcome)
        if outcome.skipped and current_plan().changes:
            self._announce_skip(scale)
            self._raise_on_collapse(scale, culprits)
        return outcome

    def _may_collapse(self, scale: float | None) -> bool:
        plan = current_plan()
        last_chance = self.history.consecutive_skips + 1 >= plan.max_consecutive_skips
        return plan.changes and (last_chance or (scale is not None and scale <= plan.min_scale))

    def _announce_skip(self, scale: float | None) -> None:
        if torch.distributed.get_rank() != 0:
            return
        if scale is None or not self.history.calibrating:
            logger.warning("%s: optimizer step %d skipped, loss scale %s", self.role, self.history.attempted, scale)
        elif self.history.attempted == 1:
            logger.warning(
                "%s: gradients overflowed at loss scale %g; the scale now looks for its level, so the first "
                "steps may be skipped. This is calibration and expected.",
                self.role,
                scale,
            )

    def _raise_on_collapse(self, scale: float | None, culprits: list[str]) -> None:
        reason = collapse_reason(current_plan(), self.history, scale)
        if reason is None:
            return
        # Every rank skipped the same step, so every rank comes here.
        of_ranks: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(of_ranks, culprits)
        raise LossScaleCollapse(self.role, self.history.attempted, reason, dict(enumerate(of_ranks)))
