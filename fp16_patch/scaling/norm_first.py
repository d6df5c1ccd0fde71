"""A framework's step by torch's scaler, taken only where the norm of the gradients turned out finite.

The scaler asks of each gradient whether it is finite, before it unscales it. That misses finite gradients whose sum of
squares is not: clipping by an infinite norm makes zeros of them, or NaN where nothing is to be clipped, and the
optimizer steps with those. It misses, too, what unscaling itself makes of them. Frameworks clip, step, and return the
norm last, so the scaler puts off what it is asked to do until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from fp16_patch.runtime import torch_private
from fp16_patch.scaling.offloaded_gradients import HostReadingScaler
from fp16_patch.scaling.ranks import max_over_ranks


class PatientScaler(HostReadingScaler):
    """torch's scaler for sharded gradients, which can put off a step."""

    _put_off: list[Optimizer] | None = None

    @contextmanager
    def putting_off(self) -> Iterator[list[Optimizer]]:
        """Only collect the optimizers that are to step in this block, and do not adapt the scale."""
        self._put_off = []
        try:
            yield self._put_off
        finally:
            self._put_off = None

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if self._put_off is None:
            return super().step(optimizer, *args, **kwargs)
        self._put_off.append(optimizer)
        return None

    def update(self, new_scale: Any = None) -> None:
        if self._put_off is None:
            super().update(new_scale)


def take(scaler: Any, step: Callable[[], Any]) -> Any:
    """Let a framework unscale, clip and return the norm; then step and adapt the scale in its place.

    Args:
        scaler: the one that the framework steps with. One that cannot put off a step is left to the framework.
    """
    if not isinstance(scaler, PatientScaler):
        return step()
    with scaler.putting_off() as optimizers:
        norm = step()
    skip_unless_finite(scaler, optimizers, float_of(norm))
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return norm


def skip_unless_finite(scaler: Any, optimizers: Iterable[Optimizer], norm: float) -> None:
    """Let the scaler skip its step, and lower the scale after it, if the norm is not finite on any rank."""
    found = torch.full_like(torch_private.scale_on_device(scaler), float(not math.isfinite(norm)))
    if max_over_ranks(found).item():
        for optimizer in optimizers:
            torch_private.mark_unscaled(scaler, optimizer, found_inf=found)


def float_of(norm: Any) -> float:
    """Return a norm that a framework returned: a number, a tensor, or a DTensor of all ranks'."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
