"""What becomes of each of Megatron's optimizer steps: a skipped one is no error, is counted, and holds the schedule.

A step is `(update_successful, grad_norm, num_zeros)`; after an overflow Megatron answers `(False, None, None)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.scaling.optimizer_step import WatchedEngine, history_of, share_history
from fp16_patch.scaling.scaler import nonfinite_parameters
from fp16_patch.verl.fsdp.engine import reducible_metrics
from fp16_patch.verl.megatron.dtypes import parts_of, role_of, scalers_of

_Answer = tuple[bool, Any, Any]


def optimizer_step(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronEngine.optimizer_step`: verl takes a step that Megatron skipped for an error."""
    share_history(engine.optimizer, engine)
    with _watched_steps(engine.optimizer, role_of(engine), engine.module):
        return wrapped(*args, **kwargs)


def update_policy(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`MegatronPPOActor.update_policy`: as in the engine; what became of the steps goes into verl's metrics."""
    with _watched_steps(actor.actor_optimizer, "actor", actor.actor_module) as steps:
        metrics = wrapped(*args, **kwargs)
    return _with_outcomes(metrics, "actor", steps)


def update_critic(wrapped: Any, critic: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`MegatronPPOCritic.update_critic`: as for the actor."""
    with _watched_steps(critic.critic_optimizer, "critic", critic.critic_module) as steps:
        metrics = wrapped(*args, **kwargs)
    return _with_outcomes(metrics, "critic", steps)


def make_scheduler(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`get_megatron_optimizer_param_scheduler`: the schedule counts updates, so it waits for one that was taken."""
    scheduler = wrapped(*args, **kwargs)
    if current_plan().overrides_dtype:
        scheduler.step = _WaitingStep(scheduler.step, kwargs["optimizer"] if "optimizer" in kwargs else args[0])
    return scheduler


class _WaitingStep:
    """A scheduler's `step` that does nothing while the optimizer has taken none since the last."""

    def __init__(self, step: Callable[..., Any], optimizer: Any) -> None:
        self.step, self.optimizer = step, optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        history = history_of(self.optimizer)
        # Nothing attempted yet: a checkpoint is being loaded, which goes forward by as many steps as it had taken.
        if current_plan().overrides_dtype and history.attempted and not history.taken_since_lr:
            return None
        history.taken_since_lr = False
        return self.step(*args, **kwargs)


class _MegatronStep(WatchedEngine):
    answer: _Answer

    def __init__(self, optimizer: Any, role: str, chunks: Iterable[Any], take: Callable[[], _Answer]) -> None:
        super().__init__(optimizer, role)
        self.chunks, self._take, self.scalers = chunks, take, scalers_of(optimizer)

    def loss_scale(self) -> float | None:
        return float(self.scalers[0].scale.item()) if self.scalers else None

    def take(self) -> float:
        self.answer = self._take()
        if self.scalers and current_plan().overrides_dtype:
            _level(self.scalers)
        taken, grad_norm, _ = self.answer
        return float(grad_norm) if taken and grad_norm is not None else math.inf

    def was_skipped(self, scale_before: float | None, scale_after: float | None, grad_norm: float) -> bool:
        return bool(self.scalers) and not self.answer[0]

    def nonfinite(self) -> list[str]:
        return nonfinite_parameters(_gradients(self.chunks))


@contextmanager
def _watched_steps(optimizer: Any, role: str, chunks: Iterable[Any]) -> Iterator[list[dict[str, float]]]:
    """Meanwhile the optimizer's steps are recorded, and a skipped one answers as verl knows it.

    verl's functions step in their middle, and several times, where no wrapper of theirs reaches.
    """
    chunks, steps, take = list(chunks), [], optimizer.step

    def step() -> _Answer:
        _note_what_is_kept(optimizer, role, chunks)
        watched = _MegatronStep(optimizer, role, chunks, take)
        outcome = watched.step()
        steps.append(reducible_metrics(watched.history))
        if outcome.skipped and current_plan().overrides_dtype:
            return True, outcome.grad_norm, 0
        return watched.answer

    optimizer.step = step
    try:
        yield steps
    finally:
        del optimizer.step


def _level(scalers: list[Any]) -> None:
    """Bring the scalers of a chained optimizer to the lowest scale among them.

    Each looks at its own gradients only. If those of the experts overflow and the others do not, the loss goes on being
    multiplied by the scale of the others, and the experts' gradients are divided by theirs.
    """
    lowest = min(scalers, key=lambda scaler: float(scaler.scale.item())).scale.clone()
    growth = min(scaler._growth_tracker for scaler in scalers)
    hysteresis = min(scaler._hysteresis_tracker for scaler in scalers)
    for scaler in scalers:
        scaler._scale, scaler._growth_tracker, scaler._hysteresis_tracker = lowest.clone(), growth, hysteresis


def _with_outcomes(metrics: dict[str, Any], role: str, steps: list[dict[str, float]]) -> dict[str, Any]:
    if current_plan().overrides_dtype and any(step["fp16/step_skipped"] for step in steps):
        norms = [norm for norm in metrics.pop(f"{role}/grad_norm", []) if norm is not None and math.isfinite(norm)]
        if norms:
            metrics[f"{role}/grad_norm"] = norms
    for step in steps:
        for name, value in step.items():
            metrics.setdefault(f"{role}/{name}", []).append(value)
    return metrics


def _note_what_is_kept(optimizer: Any, role: str, chunks: Iterable[Any]) -> None:
    ledger().note(role, "gradient", *(gradient.dtype for _, gradient in _gradients(chunks)))
    ledger().note(role, "master", *(dtype for part in parts_of(optimizer) for dtype in _masters(part)))


def _gradients(chunks: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and gradient of every parameter, of which Megatron's buffers hold the sum."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", parameter.grad)
            if gradient is not None:
                yield name, gradient


def _masters(part: Any) -> Iterator[torch.dtype]:
    if getattr(part.config, "use_precision_aware_optimizer", False):
        # TransformerEngine's Adam keeps them out of sight, in this dtype.
        yield part.config.main_params_dtype
        return
    for group in part.param_groups:
        yield from (parameter.dtype for parameter in group["params"])
