"""An LR schedule that waits: it counts updates, so it does not advance for a skipped one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.optimizer_step import history_of


class HeldScheduleStep:
    """A schedule's `step` that does nothing if no optimizer step was taken since its last.

    Args:
        step: the schedule's own.
        engine: the object whose optimizer steps count.
    """

    def __init__(self, step: Callable[..., Any], engine: Any) -> None:
        self.step, self.engine = step, engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if holds_lr(self.engine) else self.step(*args, **kwargs)


def holds_lr(engine: Any) -> bool:
    """Return whether the schedule must not advance now. Asked once each time the framework would advance it."""
    may_advance = history_of(engine).lr_may_advance()
    return current_plan().overrides_dtype and not may_advance
