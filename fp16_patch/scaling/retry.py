"""An update whose gradients overflow is computed again at the lowered loss scale, from where it began.

What is computed again is what was: the weights have not moved, the generators of random numbers are set back, and a
power of two as scale changes exponents only. So the step that is taken is bit for bit the one of a run whose scale had
been that low before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fp16_patch.runtime.activation import current_plan

if TYPE_CHECKING:
    from fp16_patch.scaling.optimizer_step import Overflow

T = TypeVar("T")
_UPDATE = "_fp16_patch_update"


class RandomState:
    """The generators of this process, on the host and on the device in use, as they are now.

    Args:
        device: type of the device, as `cuda` or `npu`; for `cpu` there is only the host's.
    """

    def __init__(self, device: str) -> None:
        self._device = None if device == "cpu" else getattr(torch, device)
        self._host_state = torch.get_rng_state()
        self._device_state = None if self._device is None else self._device.get_rng_state()

    def restore(self) -> None:
        torch.set_rng_state(self._host_state)
        if self._device is not None:
            self._device.set_rng_state(self._device_state)


class Update:
    """An update in progress that can be computed again.

    Attributes:
        retries: how often it has been.
        overflow: the step just attempted, while it is open whether it will be once more.
        first: the one at the scale that was in force.
    """

    def __init__(self) -> None:
        self.retries = 0
        self.overflow: Overflow | None = None
        self.first: Overflow | None = None

    def may_repeat(self, scale: float | None) -> bool:
        """Whether an attempt that overflowed at this scale may be followed by another, at a lower one."""
        plan = current_plan()
        return scale is not None and scale > plan.min_scale and self.retries < plan.max_retries

    def leave_open(self, overflow: Overflow) -> None:
        self.overflow = overflow
        self.first = self.first or overflow

    def try_again(self, overflow: Overflow) -> None:
        self.retries += 1
        overflow.announce_retry(self.retries)


def update_of(engine: Any) -> Update | None:
    """The engine's update in progress; None while what it computes cannot be computed again."""
    return getattr(engine, _UPDATE, None)


@contextmanager
def updating(engine: Any) -> Iterator[Update]:
    """What the engine computes in this block can be computed again."""
    update = Update()
    setattr(engine, _UPDATE, update)
    try:
        yield update
    finally:
        setattr(engine, _UPDATE, None)


def wanted() -> bool:
    plan = current_plan()
    return plan.scales_loss and plan.on_overflow == "retry" and plan.max_retries > 0


def say_no_retries(log: logging.Logger, role: str) -> None:
    """Of a learner that computes its mini-batches in the middle of a function, where none can be computed again."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        log.info("%s: this learner cannot compute a mini-batch again; one that overflows is skipped", role)


def until_taken(engine: Any, attempt: Callable[[bool], T], forward_was_finite: Callable[[T], bool]) -> T:
    """What the attempt at which the step is taken, or is skipped for good, gives.

    Args:
        engine: the object whose steps `WatchedEngine` watches.
        attempt: computes the update and steps; told whether it is a repetition, before which it has to set the
            generators back.
        forward_was_finite: of an attempt, on this rank. No lower scale helps where the loss itself is not finite, or
            where it leaves out what is not: its gradient is NaN all the same.
    """
    with updating(engine) as update:
        result = attempt(False)
        while (overflow := update.overflow) is not None:
            update.overflow = None
            helps = everywhere(forward_was_finite(result))
            last = not helps or update.retries + 1 >= current_plan().max_retries
            if overflow.wants_suspects(first=update.retries == 0, last=last):
                with overflow.suspecting():
                    result = attempt(True)
                if update.overflow is None:
                    return result  # what overflowed has not done so again, and the step is taken
                update.overflow = None
                helps = helps and not overflow.began_in_the_forward()
            if not helps:
                (update.first or overflow).give_up(update.retries)
                return result
            update.try_again(overflow)
            result = attempt(True)
        return result


def everywhere(fact: bool) -> bool:
    """Whether it holds on every rank."""
    facts: list[bool] = [fact] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(facts, fact)
    return all(facts)
