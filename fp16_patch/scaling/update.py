"""A mini-batch's way to its optimizer step, on an engine with one of torch's gradient scalers.

A framework's engine has one `MiniBatchUpdate` in a slot. Its hooks call two methods: `run_mini_batch` around the call
that computes a mini-batch, and `run` around the optimizer step in the middle of it.

    run_mini_batch
        measure_first_scale     at the run's first: compute it once without its step, for the scale its gradients bear
        maybe_hold_growth       let the scale grow only if recent gradients would fit
        retry_on_overflow       compute it, and again at a lower scale while it overflows
            GradientStatsHooks  every so many updates: look at its gradients
            the framework       forward, backward
            run                 take the optimizer step if the driver allows it, record the outcome, raise at a collapse
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.first_scale import measure_first_scale
from fp16_patch.scaling.gradient_stats import GradientStats, GradientStatsHooks, groups_of, stats_of_all_ranks
from fp16_patch.scaling.random_state import RandomState
from fp16_patch.scaling.retry import RepeatableUpdate, retries_wanted
from fp16_patch.scaling.scale_growth import GradMaxWindow, maybe_hold_growth, wants_gradient_stats

T = TypeVar("T")


class MiniBatchUpdate(RepeatableUpdate):
    """The updates of an engine that computes a mini-batch, its optimizer step included, in one call.

    Attributes:
        measuring: the gradients being computed are only measured; the engine must not step.
        gradients: what the last update's gradients were like; None if it was not looked at, or skipped.
        scale_is_known: the scale is that of earlier steps, of which there is no history.
    """

    def __init__(self, engine: Any, role: str) -> None:
        super().__init__(engine, role)
        self.measuring = False
        self.gradients: GradientStats | None = None
        self.scale_is_known = False
        self._grad_max = GradMaxWindow()

    @abstractmethod
    def zero_grad(self) -> None:
        """Throw away the gradients that were computed."""

    @abstractmethod
    def loss_is_finite(self, result: Any) -> bool:
        """Return whether the loss is, on this rank, in what computing a mini-batch returned."""

    def groups(self) -> Mapping[nn.Module, str]:
        """Return the group of every module whose gradients are counted."""
        return groups_of(self.module())

    def run_mini_batch(self, compute: Callable[[], T], random: RandomState) -> T:
        """Compute a mini-batch and take its step: again at a lower loss scale while its gradients overflow.

        Args:
            compute: forward, backward and the optimizer step, which calls `run`.
            random: what `compute` draws from, and what else it changes, as they are now.

        Returns:
            What the last attempt returned.
        """
        if current_plan().first_scale == "measured" and not (self.history.attempted or self.scale_is_known):
            self._measure_first_scale(compute, random)
        maybe_hold_growth(self.scaler, self._grad_max, self.history.attempted, self.role)
        self.gradients = None
        if not wants_gradient_stats(self.scaler, self.history.attempted):
            return self._compute_until_taken(compute, random)
        return self._look_at_gradients(compute, random)

    def _measure_first_scale(self, compute: Callable[[], T], random: RandomState) -> None:
        self.measuring = True
        try:
            measure_first_scale(self, random, compute, self.loss_is_finite)
        finally:
            self.measuring = False
        self.zero_grad()

    def _compute_until_taken(self, compute: Callable[[], T], random: RandomState) -> T:
        if not retries_wanted():
            return compute()

        def attempt(again: bool) -> T:
            if again:
                random.restore()
            return compute()

        result: T = self.retry_on_overflow(attempt, self.loss_is_finite)
        return result

    def _look_at_gradients(self, compute: Callable[[], T], random: RandomState) -> T:
        """Compute a mini-batch with hooks; those of the last attempt count, if its step was taken."""
        attempts: list[tuple[float, GradientStatsHooks]] = []

        def hooked() -> T:
            scale = self.loss_scale()
            assert scale is not None
            with GradientStatsHooks(self.module(), self.groups()) as hooks:
                result = compute()
            attempts[:] = [(scale, hooks)]
            return result

        result = self._compute_until_taken(hooked, random)
        outcome = self.history.last
        if outcome is not None and not outcome.skipped:
            self.gradients = stats_of_all_ranks(*attempts[-1])
            self._grad_max.add(self.history.attempted, self.gradients.unscaled)
        return result

    def metrics(self) -> dict[str, float]:
        """Return `fp16/*` of the last update: its step, and its gradients if they were looked at."""
        return {**super().metrics(), **({} if self.gradients is None else self.gradients.metrics())}

    def resume(self, history: Mapping[str, Any]) -> None:
        super().resume(history)
        # Steps are counted from elsewhere: what was seen at others says nothing.
        self._grad_max = GradMaxWindow()
