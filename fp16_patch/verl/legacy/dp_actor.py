"""`DataParallelPPOActor` and `DataParallelPPOCritic`, verl's learners before its engines."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.scaling import norm_first
from fp16_patch.scaling.norm_first import float_of, skip_unless_finite
from fp16_patch.scaling.optimizer_step import OptimizerStep
from fp16_patch.scaling.retry import say_no_retries
from fp16_patch.scaling.scaler import StepOutcome, nonfinite_parameters, sharded_scaler
from fp16_patch.verl.fsdp.device import device_type
from fp16_patch.verl.fsdp.gradients import local_gradients, note_gradients
from fp16_patch.verl.fsdp.numerics import autocast_upcasts_softmax, is_unit
from fp16_patch.verl.fsdp.step_metrics import add_steps

logger = logging.getLogger(__name__)


def role_of(learner: Any) -> str:
    """Return `actor`, `ref` or `critic`: a reference is an actor without an optimizer."""
    if hasattr(learner, "critic_module"):
        return "critic"
    return "ref" if learner.actor_optimizer is None else "actor"


def module_of(learner: Any) -> nn.Module:
    """Return the model that a learner trains or scores with."""
    return learner.critic_module if role_of(learner) == "critic" else learner.actor_module


def new_learner(wrapped: Any, learner: Any, args: Any, kwargs: Any) -> None:
    """`__init__` of actor and critic: set the plan's autocast dtype, and a scaler if it trains in FP16."""
    wrapped(*args, **kwargs)
    plan = current_plan()
    if plan.overrides_dtype:
        learner.param_dtype = plan.torch_dtype
        trains = plan.scales_loss and _optimizer_of(learner) is not None
        learner.scaler = sharded_scaler(plan, device_type()) if trains else None
        if trains and plan.on_overflow == "retry":
            say_no_retries(logger, role_of(learner))


def divide_in_fp32(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> Any:
    """`DataParallelPPOActor._forward_micro_batch`: divide logits by the temperature in FP32."""
    temperature = argument(wrapped, args, kwargs, "temperature")
    if not current_plan().overrides_dtype or (is_unit(temperature) and autocast_upcasts_softmax()):
        return wrapped(*args, **kwargs)
    with _logits_in_fp32(actor.actor_module):
        return wrapped(*args, **kwargs)


def scale_log_probs(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor]:
    """`DataParallelPPOActor._forward_micro_batch` where the loss is not scaled: scale its gradients here.

    What follows, up to the loss, is FP32, so that this is the same as scaling the loss.
    """
    entropy, log_probs = wrapped(*args, **kwargs)
    if not _scales(actor):
        return entropy, log_probs
    return None if entropy is None else _scaled(actor.scaler, entropy), _scaled(actor.scaler, log_probs)


def scale_values(wrapped: Any, critic: Any, args: Any, kwargs: Any) -> Tensor:
    """`DataParallelPPOCritic._forward_micro_batch`: return values in FP32, and scale their gradients."""
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


class LearnerStep(OptimizerStep):
    """The steps of an actor or critic, each of which returns the norm, a tensor.

    Attributes:
        skips_by_norm: verl knows no scaler there, and skips a step whose norm is not finite.
    """

    skips_by_norm = False

    def __init__(self, learner: Any) -> None:
        super().__init__(learner, role_of(learner))

    @property
    def scaler(self) -> Any:
        return getattr(self.engine, "scaler", None)

    def outcome_of(self, returned: Any, scale_before: float | None) -> StepOutcome:
        if self.skips_by_norm:
            norm = float_of(returned)
            return StepOutcome(self.loss_scale(), not math.isfinite(norm), norm)
        return super().outcome_of(returned, scale_before)

    def note_dtypes(self) -> None:
        note_gradients(module_of(self.engine), self.role)

    def nonfinite_gradients(self) -> list[str]:
        return nonfinite_parameters(local_gradients(module_of(self.engine)))


def step_with_scaler(wrapped: Any, learner: Any, args: Any, kwargs: Any) -> Any:
    """`_optimizer_step` of an actor that has a scaler: step only if allowed, record it, raise at a collapse."""
    step = LearnerStep.of(learner)
    _, grad_norm = step.run(lambda: norm_first.take(step.scaler, partial(wrapped, *args, **kwargs)))
    return grad_norm


def step_without_scaler(wrapped: Any, learner: Any, args: Any, kwargs: Any) -> Any:
    """`_optimizer_step` that knows no scaler: unscale gradients before it clips them, adapt the scale afterwards."""
    step = LearnerStep.of(learner)
    step.skips_by_norm = True

    def take() -> Any:
        scaler = step.scaler if current_plan().overrides_dtype else None
        if scaler is None:
            return wrapped(*args, **kwargs)
        optimizer = _optimizer_of(learner)
        scaler.unscale_(optimizer)
        grad_norm = wrapped(*args, **kwargs)
        skip_unless_finite(scaler, [optimizer], float_of(grad_norm))
        scaler.update()
        return grad_norm

    _, grad_norm = step.run(take)
    return grad_norm


def update(wrapped: Any, learner: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`update_policy` and `update_critic`: add the outcomes of steps to the metrics, and no norm of a skipped one."""
    step = LearnerStep.of(learner)
    with step.recording() as steps:
        metrics: dict[str, Any] = wrapped(*args, **kwargs)
    add_steps(metrics, step.role, steps)
    return metrics


def _optimizer_of(learner: Any) -> Any:
    return learner.critic_optimizer if role_of(learner) == "critic" else learner.actor_optimizer


def _scales(learner: Any) -> bool:
    scaler = getattr(learner, "scaler", None)
    return current_plan().overrides_dtype and scaler is not None and torch.is_grad_enabled()


def _scaled(scaler: Any, output: Tensor) -> Tensor:
    scale = scaler.scale(torch.ones((), dtype=torch.float32, device=output.device))
    return _ScaledGradient.apply(output, scale)


class _ScaledGradient(torch.autograd.Function):  # type: ignore[misc]
    """Returns its input, and multiplies its gradient."""

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
