"""An engine's optimizer step under the plan: allowed by the driver, recorded, and stopped at a collapse."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch

from fp16_patch.plan.errors import LossScaleCollapse
from fp16_patch.runtime import preflight
from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.norm_first import float_of
from fp16_patch.scaling.ranks import gather
from fp16_patch.scaling.scaler import (
    StepHistory,
    StepOutcome,
    at_floor,
    collapse_reason,
    scale_of,
    set_scale,
    step_outcome,
    usable_scale,
)

logger = logging.getLogger(__name__)

S = TypeVar("S", bound="OptimizerStep")
_SLOT = "_fp16_patch"


@dataclass(frozen=True)
class Attempt:
    """An optimizer step that was tried.

    Attributes:
        outcome: what became of it.
        scale: the loss scale that its gradients were computed with; None without a scaler.
        culprits: parameters of this rank with non-finite gradients, where they were looked for.
    """

    outcome: StepOutcome
    scale: float | None
    culprits: list[str]


class RecordedStep(NamedTuple):
    """A step that was taken, or skipped for good, and the `fp16/*` metrics as it left them."""

    outcome: StepOutcome
    metrics: dict[str, float]


class OptimizerStep(ABC):
    """The optimizer step of one engine of a framework, and the history of its steps.

    It lies in one slot of the framework's object, where `of` finds it. Subclasses say how a framework steps; by default
    it does so by a gradient scaler of torch's.

    Args:
        engine: the framework's object.
        role: `actor`, `critic` or another, as in logs and errors.
    """

    def __init__(self, engine: Any, role: str) -> None:
        self.engine, self.role = engine, role
        self.history = StepHistory()
        self.overflow_sites: dict[int, str] = {}
        """Rank → where the last overflow that was searched for began."""
        self._recording: list[RecordedStep] | None = None

    @classmethod
    def of(cls: type[S], engine: Any, *more: Any) -> S:
        """Return what lies in the engine's slot; at first use, make it from these arguments."""
        if not hasattr(engine, _SLOT):
            cls(engine, *more).share_with(engine)
        return getattr(engine, _SLOT)  # type: ignore[no-any-return]

    def share_with(self, engine: Any) -> None:
        """Put this one into a framework object's slot."""
        setattr(engine, _SLOT, self)

    def run(self, step: Callable[[], Any]) -> tuple[StepOutcome, Any]:
        """Take the framework's optimizer step, if the driver allows training, and record what became of it.

        Args:
            step: the framework's.

        Returns:
            The outcome, and what `step` returned.

        Raises:
            PrecisionError: the driver never judged the job.
            LossScaleCollapse: skips do not end; on every rank.
        """
        self.note_dtypes()
        preflight.require_training_grant()
        scale = self.loss_scale()
        # Looked for before the step: clipping by a NaN norm makes every gradient NaN.
        culprits = self.nonfinite_gradients() if self._may_collapse(scale) else []
        returned = self.take(step)
        outcome = self._with_usable_scale(self.outcome_of(returned, scale))
        self.settle(Attempt(outcome, scale, culprits))
        return outcome, returned

    # How a framework differs.

    @property
    def scaler(self) -> Any:
        """torch's gradient scaler; None without one, and where the framework has one of its own."""
        return None

    @abstractmethod
    def note_dtypes(self) -> None:
        """Note the dtypes of gradients and master weights in the ledger."""

    @abstractmethod
    def nonfinite_gradients(self) -> list[str]:
        """Name the first parameters with non-finite gradients on this rank."""

    def loss_scale(self) -> float | None:
        """Return the scale in force; None without a scaler."""
        return scale_of(self.scaler)

    def set_loss_scale(self, scale: float) -> None:
        """Go on at this scale."""
        set_scale(self.scaler, scale)

    def take(self, step: Callable[[], Any]) -> Any:
        """Take the framework's step, with what must be done right before and after."""
        return step()

    def outcome_of(self, returned: Any, scale_before: float | None) -> StepOutcome:
        """Return what became of a step that returned this; by default the norm of the unscaled gradients."""
        prevented = current_plan().overrides_dtype
        return step_outcome(self.scaler, scale_before, float_of(returned), needs_finite_norm=prevented)

    # What is recorded.

    def settle(self, attempt: Attempt) -> None:
        """Record an attempt; where it may be repeated, only the last."""
        self.record(attempt)

    def record(self, attempt: Attempt, retries: int = 0) -> None:
        """Add a step, taken or skipped for good, to the history.

        Args:
            retries: how often it has been tried again before.

        Raises:
            LossScaleCollapse: skips do not end; on every rank.
        """
        self.history.add(attempt.outcome)
        if attempt.outcome.skipped and current_plan().overrides_dtype:
            self._announce_skip(attempt.scale, retries)
            self._raise_on_collapse(attempt)
        if self._recording is not None:
            self._recording.append(RecordedStep(attempt.outcome, self.history.metrics()))

    @contextmanager
    def recording(self) -> Iterator[list[RecordedStep]]:
        """Collect the steps that are recorded in this block."""
        steps: list[RecordedStep] = []
        self._recording = steps
        try:
            yield steps
        finally:
            self._recording = None

    def metrics(self) -> dict[str, float]:
        """Return `fp16/*` of the last step."""
        return self.history.metrics()

    def resume(self, history: Mapping[str, Any]) -> None:
        """Go on with the history of a checkpoint."""
        self.history.load_state_dict(history)

    def _with_usable_scale(self, outcome: StepOutcome) -> StepOutcome:
        """Bring the scale back where a step has left it out of its bounds, or it was none to begin with."""
        plan, scale = current_plan(), outcome.loss_scale
        if not plan.overrides_dtype or scale is None or scale == (usable := usable_scale(scale, plan)):
            return outcome
        if not 0 < scale < math.inf and torch.distributed.get_rank() == 0:
            logger.warning(
                "%s: the loss scale was %g, with which nothing can be computed; it is now %g", self.role, scale, usable
            )
        self.set_loss_scale(usable)
        return replace(outcome, loss_scale=usable)

    def _may_collapse(self, scale: float | None) -> bool:
        plan = current_plan()
        last_chance = self.history.consecutive_skips + 1 >= plan.max_consecutive_skips
        return plan.overrides_dtype and (last_chance or at_floor(scale, plan))

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

    def _raise_on_collapse(self, attempt: Attempt) -> None:
        reason = collapse_reason(current_plan(), self.history, attempt.scale)
        if reason is None:
            return
        # Every rank skipped the same step, so every rank comes here.
        culprits = dict(enumerate(gather(attempt.culprits)))
        raise LossScaleCollapse(self.role, self.history.attempted, reason, culprits, self.overflow_sites)


def step_of(engine: Any) -> OptimizerStep | None:
    """Return what lies in an engine's slot; None before its first step."""
    return getattr(engine, _SLOT, None)


def history_of(engine: Any) -> StepHistory:
    """Return the history of an engine's optimizer steps; an empty one before its first."""
    step = step_of(engine)
    return StepHistory() if step is None else step.history


def start_anew(engine: Any) -> None:
    """Forget the steps of an engine that is built again."""
    if hasattr(engine, _SLOT):
        delattr(engine, _SLOT)
