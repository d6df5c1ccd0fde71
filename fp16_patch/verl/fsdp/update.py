"""The FSDP engine's updates: its optimizer step, and the LR schedule after it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import nn

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling import norm_first
from fp16_patch.scaling.lr_hold import holds_lr
from fp16_patch.scaling.scaler import nonfinite_parameters
from fp16_patch.scaling.update import MiniBatchUpdate
from fp16_patch.verl.config.supported_engines import FSDP, VEOMNI
from fp16_patch.verl.fsdp import fused_step
from fp16_patch.verl.fsdp.engine import role_of
from fp16_patch.verl.fsdp.gradients import local_gradients, note_gradients


class FSDPUpdate(MiniBatchUpdate):
    """The updates of an engine whose `scaler` is torch's."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, role_of(engine))

    @property
    def scaler(self) -> Any:
        # Subclasses of verl's engine that build their module another way never set one.
        return getattr(self.engine, "scaler", None)

    def module(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module

    def note_dtypes(self) -> None:
        note_gradients(self.engine.module, self.role)

    def nonfinite_gradients(self) -> list[str]:
        return nonfinite_parameters(local_gradients(self.engine.module))

    def zero_grad(self) -> None:
        self.engine.optimizer_zero_grad()

    def loss_is_finite(self, result: Any) -> bool:
        return all(map(math.isfinite, result["loss"]))


def is_repeatable(engine: Any) -> bool:
    """Return whether all that an update does is in `train_batch`, and its scaler is the one made here."""
    return scales_loss(engine) and engine.engine_config.strategy in (*FSDP, VEOMNI)


def scales_loss(engine: Any) -> bool:
    """Return whether the plan has the engine's losses scaled, and the engine a scaler for them."""
    scaler = getattr(engine, "scaler", None)
    return current_plan().scales_loss and scaler is not None and bool(scaler.is_enabled())


def optimizer_step(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> float:
    """`FSDPEngine.optimizer_step`: step only if the driver allows it, record the outcome, raise at a collapse."""
    update = FSDPUpdate.of(engine)
    if update.measuring:
        return 0.0
    fuses = fused_step.possible(engine)
    stock = partial(wrapped, *args, **kwargs)
    outcome, _ = update.run(lambda: fused_step.take(engine) if fuses else norm_first.take(update.scaler, stock))
    return outcome.grad_norm


def lr_scheduler_step(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> float:
    """`FSDPEngine.lr_scheduler_step`: hold the schedule, which counts updates, until one was taken."""
    if holds_lr(engine):
        return engine.lr_scheduler.get_last_lr()[0]  # type: ignore[no-any-return]
    return wrapped(*args, **kwargs)  # type: ignore[no-any-return]
