"""An update whose gradients overflow is computed again at the lowered loss scale, from where it began.

What is computed again is what was: the weights have not moved, the generators of random numbers are set back, and a
power of two as scale changes exponents only. So the step that is taken is bit for bit the one of a run whose scale had
been that low before, as far as the kernels give the same for the same: those that add up atomically on a GPU do not.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.optimizer_step import Attempt, OptimizerStep
from fp16_patch.scaling.ranks import all_ranks, gather
from fp16_patch.scaling.saved_state import is_scale
from fp16_patch.scaling.scaler import at_floor
from fp16_patch.scaling.tensor_range import AbsMaxHooks, first_nonfinite, forward_is_nan

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Each computes an update once more.
_MAX_SEARCHES = 3


def retries_wanted() -> bool:
    """Return whether the plan asks for retries."""
    plan = current_plan()
    return plan.scales_loss and plan.on_overflow == "retry" and plan.max_retries > 0


def say_no_retries(log: logging.Logger, role: str) -> None:
    """Say so of a learner that computes its mini-batches in the middle of a function, where none can be repeated."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        log.info("%s: this learner cannot compute a mini-batch again; one that overflows is skipped", role)


@dataclass
class _Retries:
    """The attempts at one update.

    Attributes:
        count: retries so far.
        overflow: the attempt just made, while it is open whether another one follows.
        first: the first one that overflowed, at the scale that was in force.
    """

    count: int = 0
    overflow: Attempt | None = None
    first: Attempt | None = None

    def take_overflow(self) -> Attempt | None:
        overflow, self.overflow = self.overflow, None
        return overflow


class RepeatableUpdate(OptimizerStep):
    """The optimizer step of an engine whose update can be computed again."""

    def __init__(self, engine: Any, role: str) -> None:
        super().__init__(engine, role)
        self._retries: _Retries | None = None
        self._searches = 0

    @abstractmethod
    def module(self) -> nn.Module:
        """Return the model that is trained."""

    def rollback_counters(self) -> None:
        """Take back what the framework has counted for an attempt that will be repeated."""

    def retry_on_overflow(self, compute: Callable[[bool], T], forward_was_finite: Callable[[T], bool]) -> T:
        """Compute an update until its step is taken, or skipped for good.

        Args:
            compute: computes the update and steps, which calls `run`; told whether it is a repetition, before which it
                has to set the generators back.
            forward_was_finite: of what that returned, on this rank. No lower scale helps where the loss itself is not
                finite, or where it leaves out what is not: its gradient is NaN all the same.

        Returns:
            What `compute` returned at last.

        Raises:
            LossScaleCollapse: skips do not end; on every rank.
        """
        with self._retrying() as retries:
            result = compute(False)
            while (overflow := retries.take_overflow()) is not None:
                helps = all_ranks(forward_was_finite(result))
                last = not helps or retries.count + 1 >= current_plan().max_retries
                if self._wants_search(first=retries.count == 0, last=last):
                    result, forward_was_nan = self._search(overflow, compute)
                    if retries.take_overflow() is None:
                        return result  # what overflowed has not done so again, and the step is taken
                    helps = helps and not forward_was_nan
                if not helps:
                    self._skip(retries.first or overflow, retries.count)
                    return result
                retries.count += 1
                self._announce_retry(overflow, retries.count)
                result = compute(True)
            return result

    @contextmanager
    def _retrying(self) -> Iterator[_Retries]:
        self._retries = _Retries()
        try:
            yield self._retries
        finally:
            self._retries = None

    def settle(self, attempt: Attempt) -> None:
        """Record an attempt, unless it overflowed and another one may follow."""
        retries, plan = self._retries, current_plan()
        if retries is None or not attempt.outcome.skipped:
            self.record(attempt)
        elif is_scale(attempt.scale) and not at_floor(attempt.scale, plan) and retries.count < plan.max_retries:
            self.rollback_counters()
            retries.overflow = attempt
            retries.first = retries.first or attempt
        elif retries.first is None or self.history.calibrating:
            self._skip(attempt, retries.count)
        else:
            # Steps have been taken at the scale in force: what overflows at every lower one, too, says little about it.
            self._skip(retries.first, retries.count)

    def _skip(self, attempt: Attempt, retries: int) -> None:
        """Record a skipped step, and put the scale to where this attempt left it, however low it was tried since."""
        if attempt.outcome.loss_scale is not None:
            self.set_loss_scale(attempt.outcome.loss_scale)
        self.record(attempt, retries)

    def _announce_retry(self, overflow: Attempt, number: int) -> None:
        """Count a retry of this update, and say so at its first."""
        self.history.add_retry()
        if number > 1 or torch.distributed.get_rank() != 0:
            return
        logger.warning(
            "%s: gradients overflowed at loss scale %g; optimizer step %d is tried again with the same mini-batch at "
            "%g.%s",
            self.role,
            overflow.scale,
            self.history.attempted + 1,
            overflow.outcome.loss_scale,
            " This is calibration and expected." if self.history.calibrating else "",
        )

    def _wants_search(self, *, first: bool, last: bool) -> bool:
        """Return whether to search for where it began: a few times a run, and where all other attempts were in vain.

        Args:
            first: it is the first of its update; while the scale looks for its level, that says nothing.
            last: only one more attempt can follow.
        """
        if not first:
            return last
        return (last or not self.history.calibrating) and self._searches < _MAX_SEARCHES

    def _search(self, overflow: Attempt, compute: Callable[[bool], T]) -> tuple[T, bool]:
        """Compute an attempt again, at the same scale, to see which module overflowed first.

        Returns:
            What `compute` returned, and whether the forward pass gave NaN on any rank.
        """
        assert overflow.scale is not None
        self.set_loss_scale(overflow.scale)
        with AbsMaxHooks(self.module()) as hooks:
            result = compute(True)
        largest = hooks.largest()
        of_ranks = gather((first_nonfinite(largest), forward_is_nan(largest)))
        self._searches += 1
        self.overflow_sites = {rank: str(site) for rank, (site, _) in enumerate(of_ranks) if site is not None}
        if self.overflow_sites and torch.distributed.get_rank() == 0:
            where = "; ".join(f"rank {rank}: {site}" for rank, site in self.overflow_sites.items())
            logger.warning("%s: the overflow at loss scale %g began in %s", self.role, overflow.scale, where)
        return result, any(is_nan for _, is_nan in of_ranks)
