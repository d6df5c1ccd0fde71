"""An optimizer step as every framework takes it under the plan: allowed, watched, recorded, and stopped at a collapse.

What differs between frameworks is how a step is taken and how one sees that it was skipped: `WatchedEngine`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fp16_patch.plan.errors import LossScaleCollapse
from fp16_patch.runtime import preflight
from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.retry import Update, update_of
from fp16_patch.scaling.scaler import StepHistory, StepOutcome, collapse_reason
from fp16_patch.scaling.tensor_range import Extent, first_nonfinite, forward_is_nan

logger = logging.getLogger(__name__)

_HISTORY = "_fp16_patch_history"
_LOOKED = "_fp16_patch_looked"
# Each look computes an update once more.
_LOOKS = 3


def history_of(engine: Any) -> StepHistory:
    """A framework engine's record of its optimizer steps."""
    if not hasattr(engine, _HISTORY):
        setattr(engine, _HISTORY, StepHistory())
    return getattr(engine, _HISTORY)  # type: ignore[no-any-return]


def start_anew(engine: Any) -> None:
    """Forget the steps of an engine that is built again."""
    for name in (_HISTORY, _LOOKED):
        if hasattr(engine, name):
            delattr(engine, name)


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

    def set_loss_scale(self, scale: float) -> None:
        """Compute the next attempt at this scale. Only of engines whose updates can be computed again."""
        raise NotImplementedError

    def module(self) -> nn.Module:
        """The model that is trained. Only of engines whose updates can be computed again."""
        raise NotImplementedError

    def uncount(self) -> None:  # noqa: B027, most frameworks count nothing
        """Take back what the framework has counted for an attempt that will be repeated."""

    def step(self) -> StepOutcome:
        """Take the step if the driver allows it. One that overflowed is settled only once it is not tried again.

        Raises:
            PrecisionError: the driver never judged the job.
            LossScaleCollapse: skips do not end; on every rank.
        """
        preflight.require_training_grant()
        scale = self.loss_scale()
        # Looked for before the step: clipping by a NaN norm makes every gradient NaN.
        culprits = self.nonfinite() if self._may_collapse(scale) else []
        grad_norm = self.take()
        after = self.loss_scale()
        outcome = StepOutcome(after, self.was_skipped(scale, after, grad_norm), grad_norm)
        update = update_of(self.engine)
        if outcome.skipped and update is not None:
            self._overflowed(update, Overflow(self, outcome, scale, culprits))
        else:
            self.settle(outcome, scale, culprits)
        return outcome

    def _overflowed(self, update: Update, overflow: Overflow) -> None:
        if update.may_repeat(overflow.scale):
            self.uncount()
            update.leave_open(overflow)
        elif update.first is None or self.history.calibrating:
            overflow.give_up(update.retries)
        else:
            # Steps have been taken at the scale in force: what overflows at every lower one, too, says little about it.
            update.first.give_up(update.retries)

    def settle(self, outcome: StepOutcome, scale: float | None, culprits: list[str], retries: int = 0) -> None:
        """Record what became of a step.

        Args:
            scale: the loss scale it was computed with.
            culprits: parameters of this rank.
            retries: how often it has been tried again before.

        Raises:
            LossScaleCollapse: skips do not end; on every rank.
        """
        self.history.add(outcome)
        if outcome.skipped and current_plan().overrides_dtype:
            self._announce_skip(scale, retries)
            self._raise_on_collapse(scale, culprits)

    def _may_collapse(self, scale: float | None) -> bool:
        plan = current_plan()
        last_chance = self.history.consecutive_skips + 1 >= plan.max_consecutive_skips
        return plan.overrides_dtype and (last_chance or (scale is not None and scale <= plan.min_scale))

    def _announce_skip(self, scale: float | None, retries: int) -> None:
        if torch.distributed.get_rank() != 0:
            return
        tried = f" after {retries} retries" if retries else ""
        if scale is None or not self.history.calibrating:
            step = self.history.attempted
            logger.warning("%s: optimizer step %d skipped%s, loss scale %s", self.role, step, tried, scale)
        elif self.history.attempted == 1:
            logger.warning(
                "%s: gradients overflowed at loss scale %g%s; the scale now looks for its level, so the first "
                "steps may be skipped. This is calibration and expected.",
                self.role,
                scale,
                tried,
            )

    def _raise_on_collapse(self, scale: float | None, culprits: list[str]) -> None:
        reason = collapse_reason(current_plan(), self.history, scale)
        if reason is None:
            return
        # Every rank skipped the same step, so every rank comes here.
        of_ranks = _of_every_rank(culprits)
        suspects = getattr(self.engine, _LOOKED, _Looks()).suspects
        raise LossScaleCollapse(self.role, self.history.attempted, reason, dict(enumerate(of_ranks)), suspects)


@dataclass
class _Looks:
    """Looks into an engine's overflows, and what the last one found: rank → place, and whether a forward gave NaN."""

    taken: int = 0
    suspects: dict[int, str] = field(default_factory=dict)
    forward: bool = False


@dataclass(frozen=True)
class Overflow:
    """A step whose gradients overflowed, before it is decided whether its update is tried again.

    Attributes:
        step: the step, which has lowered the scale.
        scale: the loss scale it was computed with.
        culprits: parameters of this rank, where they have been looked for.
    """

    step: WatchedEngine
    outcome: StepOutcome
    scale: float | None
    culprits: list[str]

    def give_up(self, retries: int) -> None:
        """It is a skipped step, and the scale is where this one left it, however low it has been tried since."""
        if self.outcome.loss_scale is not None:
            self.step.set_loss_scale(self.outcome.loss_scale)
        self.step.settle(self.outcome, self.scale, self.culprits, retries)

    def announce_retry(self, number: int) -> None:
        """Count a retry of this update, and say so at its first."""
        self.step.history.add_retry()
        if number > 1 or torch.distributed.get_rank() != 0:
            return
        calibrates = " This is calibration and expected." if self.step.history.calibrating else ""
        logger.warning(
            "%s: gradients overflowed at loss scale %g; optimizer step %d is tried again with the same mini-batch at "
            "%g.%s",
            self.step.role,
            self.scale,
            self.step.history.attempted + 1,
            self.outcome.loss_scale,
            calibrates,
        )

    def wants_suspects(self, first: bool, last: bool) -> bool:
        """Whether to look where it came from: a few times a run, and where all other attempts were in vain.

        Args:
            first: whether it is the first of its update; while the scale looks for its level, that says nothing.
            last: whether only one more attempt can follow.
        """
        if not first:
            return last
        return (last or not self.step.history.calibrating) and self._looks().taken < _LOOKS

    @contextmanager
    def suspecting(self) -> Iterator[None]:
        """Computed again in this block, at the same scale, the attempt shows which module overflowed first."""
        assert self.scale is not None
        self.step.set_loss_scale(self.scale)
        with Extent(self.step.module()) as extent:
            yield
        largest = extent.largest()
        of_ranks = _of_every_rank((first_nonfinite(largest), forward_is_nan(largest)))
        found = {rank: str(where) for rank, (where, _) in enumerate(of_ranks) if where is not None}
        looks = self._looks()
        looks.taken, looks.suspects, looks.forward = looks.taken + 1, found, any(is_nan for _, is_nan in of_ranks)
        if found and torch.distributed.get_rank() == 0:
            where = "; ".join(f"rank {rank}: {place}" for rank, place in found.items())
            logger.warning("%s: the overflow at loss scale %g began in %s", self.step.role, self.scale, where)

    def began_in_the_forward(self) -> bool:
        """Whether the look showed NaN before the loss, on any rank."""
        return self._looks().forward

    def _looks(self) -> _Looks:
        if not hasattr(self.step.engine, _LOOKED):
            setattr(self.step.engine, _LOOKED, _Looks())
        return getattr(self.step.engine, _LOOKED)  # type: ignore[no-any-return]


def _of_every_rank(own: Any) -> list[Any]:
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, own)
    return of_ranks
