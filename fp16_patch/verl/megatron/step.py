"""Megatron's optimizer steps: a skipped one is no error, is counted, and holds the schedule.

A step returns `(update_successful, grad_norm, num_zeros)`; after an overflow Megatron answers `(False, None, None)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.scaling.lr_hold import HeldScheduleStep
from fp16_patch.scaling.optimizer_step import OptimizerStep
from fp16_patch.scaling.saved_state import is_scale
from fp16_patch.scaling.scaler import StepOutcome, nonfinite_parameters
from fp16_patch.verl.fsdp.step_metrics import add_steps
from fp16_patch.verl.megatron.dtypes import parts_of, scalers_of
from fp16_patch.verl.megatron.scaler import MegatronScaler, ScalerState, level

_SKIPPED = (False, None, None)
# Methods of Megatron's optimizers that their `step` calls, in this order: one of these, then the step itself.
_NORMS, _INNER_STEP = ("clip_grad_norm", "get_grad_norm"), "step_with_ready_grads"


class MegatronStep(OptimizerStep):
    """The steps of one of Megatron's optimizers.

    Args:
        optimizer: Megatron's, with loss scalers of its own.
        chunks: the parts of the model.
    """

    def __init__(self, optimizer: Any, role: str, chunks: Iterable[Any]) -> None:
        super().__init__(optimizer, role)
        self.chunks, self.scalers = list(chunks), scalers_of(optimizer)

    @property
    def scaler(self) -> MegatronScaler | None:
        return MegatronScaler(self.scalers) if self.scalers else None

    def take(self, step: Callable[[], Any]) -> Any:
        if not current_plan().overrides_dtype:
            return step()
        if any(not is_scale(float(scaler.scale.item())) for scaler in self.scalers):
            # As of a damaged checkpoint. A scale of 0 makes NaN of gradients that Megatron has found finite.
            return _SKIPPED
        before = [ScalerState.of(scaler) for scaler in self.scalers]
        with _finite_norms_only(self.engine) as refused:
            answer = step()
        if self.scalers:
            if refused:
                # They were adapted before the norm was known, and may have grown.
                for scaler, state in zip(self.scalers, before, strict=True):
                    state.restore(scaler)
                    scaler.update(True)
            level(self.scalers)
        return answer

    def outcome_of(self, returned: Any, scale_before: float | None) -> StepOutcome:
        taken, grad_norm, _ = returned
        norm = float(grad_norm) if taken and grad_norm is not None else math.inf
        return StepOutcome(self.loss_scale(), not taken, norm)

    def nonfinite_gradients(self) -> list[str]:
        return nonfinite_parameters(_gradients(self.chunks))

    def note_dtypes(self) -> None:
        ledger().note(self.role, "gradient", *(gradient.dtype for _, gradient in _gradients(self.chunks)))
        ledger().note(self.role, "master", *(dtype for part in parts_of(self.engine) for dtype in _masters(part)))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the optimizer's steps in this block, and let a skipped one answer as verl knows it.

        verl's functions step in their middle, and several times, where no wrapper of theirs reaches.
        """
        take = self.engine.step

        def step() -> Any:
            outcome, answer = self.run(take)
            if outcome.skipped and current_plan().overrides_dtype:
                return True, outcome.grad_norm, 0
            return answer

        self.engine.step = step
        try:
            yield
        finally:
            del self.engine.step


def update_policy(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`MegatronPPOActor.update_policy`: record the steps, and add what became of them to verl's metrics."""
    step = MegatronStep.of(actor.actor_optimizer, "actor", actor.actor_module)
    return _with_outcomes(step, lambda: wrapped(*args, **kwargs))


def update_critic(wrapped: Any, critic: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`MegatronPPOCritic.update_critic`: record the steps, and add what became of them to verl's metrics."""
    step = MegatronStep.of(critic.critic_optimizer, "critic", critic.critic_module)
    return _with_outcomes(step, lambda: wrapped(*args, **kwargs))


def make_scheduler(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`get_megatron_optimizer_param_scheduler`: hold the schedule, which counts updates, until one was taken."""
    scheduler = wrapped(*args, **kwargs)
    if current_plan().overrides_dtype:
        scheduler.step = HeldScheduleStep(scheduler.step, argument(wrapped, args, kwargs, "optimizer"))
    return scheduler


def _with_outcomes(step: MegatronStep, update: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with step.watching(), step.recording() as steps:
        metrics = update()
    add_steps(metrics, step.role, steps)
    return metrics


@contextmanager
def _finite_norms_only(optimizer: Any) -> Iterator[list[float]]:
    """Keep Megatron from a step whose gradients' norm is not finite; the list is of such norms.

    It looks at each gradient, and only where the loss is scaled. Finite ones whose norm overflows are clipped to zero,
    and the step is taken with them. The norm is the same on all ranks, which clip by it.
    """
    refused: list[float] = []
    own = {name: getattr(optimizer, name) for name in (*_NORMS, _INNER_STEP) if hasattr(optimizer, name)}

    def noted(norm_of: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            norm = norm_of(*args, **kwargs)
            if norm is not None and not math.isfinite(norm):
                refused.append(float(norm))
            return norm

        return call

    def inner_step(*args: Any, **kwargs: Any) -> bool:
        return not refused and own[_INNER_STEP](*args, **kwargs)

    for name, method in own.items():
        setattr(optimizer, name, inner_step if name == _INNER_STEP else noted(method))
    try:
        yield refused
    finally:
        for name in own:
            delattr(optimizer, name)


def _gradients(chunks: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and gradient of every parameter as Megatron's buffers hold it.

    That is the sum over all ranks in the part that this rank's optimizer steps, and elsewhere this rank's own.
    """
    for chunk in chunks:
        for name, parameter in unwrapped(chunk).named_parameters():
            gradient = getattr(parameter, "main_grad", parameter.grad)
            if gradient is not None:
                yield name, gradient


def unwrapped(chunk: nn.Module) -> nn.Module:
    """Return the model in what Megatron has put around it: DDP, and what casts its inputs."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


def _masters(part: Any) -> Iterator[torch.dtype]:
    if getattr(part.config, "use_precision_aware_optimizer", False):
        # TransformerEngine's Adam keeps them out of sight, in this dtype.
        yield part.config.main_params_dtype
        return
    for group in part.param_groups:
        yield from (parameter.dtype for parameter in group["params"])
