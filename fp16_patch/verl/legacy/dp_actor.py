"""`DataParallelPPOActor` and `DataParallelPPOCritic`: autocast, loss scale, log-probs, the outcome of each step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.scaling.optimizer_step import WatchedEngine, history_of
from fp16_patch.scaling.retry import say_no_retries
from fp16_patch.scaling.scaler import StepOutcome, nonfinite_parameters, sharded_scaler
from fp16_patch.verl.fsdp.device import device_type
from fp16_patch.verl.fsdp.engine import (
    hold_floor,
    local_gradients,
    note_gradients,
    reducible_metrics,
    scale_of,
    scaler_of,
)
from fp16_patch.verl.fsdp.numerics import autocast_upcasts_softmax, is_unit

logger = logging.getLogger(__name__)

_METRICS = "_fp16_patch_metrics"
_NORM = "grad_norm"


def role_of(learner: Any) -> str:
    """`actor`, `ref` or `critic`: a reference is an actor without an optimizer."""
    if hasattr(learner, "critic_module"):
        return "critic"
    return "ref" if learner.actor_optimizer is None else "actor"


def module_of(learner: Any) -> nn.Module:
    """The model that a learner trains or scores with."""
    return learner.critic_module if role_of(learner) == "critic" else learner.actor_module


def new_learner(wrapped: Any, learner: Any, args: Any, kwargs: Any) -> None:
    """`__init__` of actor and critic: the plan's autocast dtype, and a scaler with its settings where one is needed."""
    wrapped(*args, **kwargs)
    plan = current_plan()
    if plan.overrides_dtype:
        learner.param_dtype = plan.torch_dtype
        trains = plan.scales_loss and _optimizer_of(learner) is not None
        learner.scaler = sharded_scaler(plan, device_type()) if trains else None
        if trains and plan.on_overflow == "retry":
            say_no_retries(logger, role_of(learner))


def divide_in_fp32(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> Any:
    """`DataParallelPPOActor._forward_micro_batch`: logits are FP32 when they are divided by the temperature."""
    temperature = kwargs["temperature"] if "temperature" in kwargs else args[1]
    if not current_plan().overrides_dtype or (is_unit(temperature) and autocast_upcasts_softmax()):
        return wrapped(*args, **kwargs)
    with _logits_in_fp32(actor.actor_module):
        return wrapped(*args, **kwargs)


def scale_log_probs(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor]:
    """`DataParallelPPOActor._forward_micro_batch` where the loss is not scaled: gradients get the scale here.

    What follows, up to the loss, is FP32, so that this is the same as scaling the loss.
    """
    entropy, log_probs = wrapped(*args, **kwargs)
    if not _scales(actor):
        return entropy, log_probs
    return None if entropy is None else _scaled(actor.scaler, entropy), _scaled(actor.scaler, log_probs)


def scale_values(wrapped: Any, critic: Any, args: Any, kwargs: Any) -> Tensor:
    """`DataParallelPPOCritic._forward_micro_batch`: values are FP32, and their gradients get the loss scale."""
    values: Tensor = wrapped(*args, **kwargs)
    if not current_plan().overrides_dtype:
        return values
    return _scaled(critic.scaler, values.float()) if _scales(critic) else values.float()


def note_log_probs(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> Any:
    """`DataParallelPPOActor._forward_micro_batch`: note the dtypes of log-probs and entropy."""
    outputs = wrapped(*args, **kwargs)
    named = isinstance(outputs, Mapping)
    log_probs = outputs["log_probs"] if named else outputs[1]
    entropy = outputs.get("entropys") if named else outputs[0]
    ledger().note(role_of(actor), "log_prob", log_probs.dtype)
    if entropy is not None:
        ledger().note(role_of(actor), "entropy", entropy.dtype)
    return outputs


def note_values(wrapped: Any, critic: Any, args: Any, kwargs: Any) -> Tensor:
    """`DataParallelPPOCritic._forward_micro_batch`: note the dtype of the values."""
    values: Tensor = wrapped(*args, **kwargs)
    ledger().note("critic", "value", values.dtype)
    return values


def step_with_scaler(wrapped: Any, learner: Any, args: Any, kwargs: Any) -> Any:
    """`_optimizer_step` of an actor that has a scaler: allowed, recorded, stopped at a collapse."""
    return _recorded(_OwnScaler(learner, lambda: wrapped(*args, **kwargs)))


def step_without_scaler(wrapped: Any, learner: Any, args: Any, kwargs: Any) -> Any:
    """`_optimizer_step` that knows no scaler: gradients are unscaled before it clips them, the scale follows."""

    def take() -> Any:
        scaler = scaler_of(learner) if current_plan().overrides_dtype else None
        if scaler is None:
            return wrapped(*args, **kwargs)
        scaler.unscale_(_optimizer_of(learner))
        grad_norm = wrapped(*args, **kwargs)
        scaler.update()
        return grad_norm

    return _recorded(_SkipsByNorm(learner, take))


def update(wrapped: Any, learner: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`update_policy` and `update_critic`: steps' outcomes go into the metrics, a skipped step's norm does not."""
    steps: list[tuple[StepOutcome, dict[str, float]]] = []
    setattr(learner, _METRICS, steps)
    metrics: dict[str, Any] = wrapped(*args, **kwargs)
    role = role_of(learner)
    for _, outcome in steps:
        for name, value in outcome.items():
            metrics.setdefault(f"{role}/{name}", []).append(value)
    if current_plan().overrides_dtype:
        taken = [outcome.grad_norm for outcome, _ in steps if not outcome.skipped]
        metrics.pop(f"{role}/{_NORM}", None)
        metrics.update({f"{role}/{_NORM}": taken} if taken else {})
    return metrics


def _optimizer_of(learner: Any) -> Any:
    return learner.critic_optimizer if role_of(learner) == "critic" else learner.actor_optimizer


def _scales(learner: Any) -> bool:
    return current_plan().overrides_dtype and scaler_of(learner) is not None and torch.is_grad_enabled()


def _scaled(scaler: Any, output: Tensor) -> Tensor:
    scale = scaler.scale(torch.ones((), dtype=torch.float32, device=output.device))
    return _ScaledGradient.apply(output, scale)


class _ScaledGradient(torch.autograd.Function):  # type: ignore[misc]
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None


@contextmanager
def _logits_in_fp32(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(_upcast_logits)
    try:
        yield
    finally:
        handle.remove()


def _upcast_logits(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    # Fused kernels return log-probs and no logits.
    if getattr(output, "logits", None) is not None:
        output.logits = output.logits.float()
    return output


def _recorded(step: _LearnerStep) -> Any:
    learner = step.engine
    note_gradients(module_of(learner), step.role)
    outcome = step.step()
    getattr(learner, _METRICS, []).append((outcome, reducible_metrics(history_of(learner))))
    if outcome.skipped and current_plan().overrides_dtype:
        hold_floor(scaler_of(learner))
    return step.returned


class _LearnerStep(WatchedEngine):
    """A step whose result, a tensor, goes back to verl as it is."""

    def __init__(self, learner: Any, take: Callable[[], Any]) -> None:
        super().__init__(learner, role_of(learner))
        self._take = take
        self.returned: Any = None

    def loss_scale(self) -> float | None:
        return scale_of(scaler_of(self.engine))

    def take(self) -> float:
        self.returned = self._take()
        whole = self.returned.full_tensor() if hasattr(self.returned, "full_tensor") else self.returned
        return float(whole)

    def nonfinite(self) -> list[str]:
        return nonfinite_parameters(local_gradients(module_of(self.engine)))


class _OwnScaler(_LearnerStep):
    def was_skipped(self, scale_before: float | None, scale_after: float | None, grad_norm: float) -> bool:
        if scaler_of(self.engine) is None:
            return not math.isfinite(grad_norm)  # what verl looks at then
        # torch lowers the scale after an overflow and never otherwise; a scaler it has disabled skips nothing.
        return scale_before is not None and scale_after is not None and scale_after < scale_before


class _SkipsByNorm(_LearnerStep):
    def was_skipped(self, scale_before: float | None, scale_after: float | None, grad_norm: float) -> bool:
        return not math.isfinite(grad_norm)
