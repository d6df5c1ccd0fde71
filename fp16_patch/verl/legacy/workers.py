"""`ActorRolloutRefWorker` and `CriticWorker`, verl's workers before its engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fp16_patch.patching.call_arguments import argument, bound
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.runtime import rope
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.runtime.compute_dtypes import watch_compute
from fp16_patch.scaling.lr_hold import HeldScheduleStep
from fp16_patch.verl.config import settings as verl_config
from fp16_patch.verl.fsdp.checkpoint import load_with_scaler, save_with_scaler
from fp16_patch.verl.legacy.dp_actor import LearnerStep

_HALF_IF_UNSET = "bfloat16"


def build_policy(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`ActorRolloutRefWorker._build_model_optimizer`: let FSDP compute in the plan's dtype, with FP32 masters."""
    call = bound(wrapped, args, kwargs).arguments
    role, trains = call.get("role", "actor"), call.get("optim_config") is not None
    _force_precision(call["fsdp_config"], trains=trains)
    built = wrapped(*args, **kwargs)
    _restore_rope(built[0], f"{role}.fsdp_config.model_dtype", "use fp32")
    _watch(built[0], role)
    return built


def build_critic(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`CriticWorker._build_critic_model_optimizer`: let FSDP compute in the plan's dtype, with FP32 masters."""
    _force_precision(argument(wrapped, args, kwargs, "config").model.fsdp_config, trains=True)
    built = wrapped(*args, **kwargs)
    _watch(built[0], "critic")
    return built


def build_reward_model(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`RewardModelWorker._build_model`: put RoPE frequencies back to FP32, and note what it computes in."""
    module = wrapped(*args, **kwargs)
    _restore_rope(module, "reward_model.enable", "use FP16_PATCH=observe")
    _watch(module, "reward")
    return module


def score_in_fp32(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """`RewardModelWorker._forward_micro_batch`: return rewards in FP32, as all that is computed from them."""
    scores: torch.Tensor = wrapped(*args, **kwargs)
    return scores.float() if current_plan().overrides_dtype else scores


def update_actor(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`ActorRolloutRefWorker.update_actor`: hold the schedule, which counts updates, until one was taken."""
    with _held_schedule(worker.actor_lr_scheduler, worker.actor):
        return wrapped(*args, **kwargs)


def update_critic(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`CriticWorker.update_critic`: hold the schedule, which counts updates, until one was taken."""
    with _held_schedule(worker.critic_lr_scheduler, worker.critic):
        return wrapped(*args, **kwargs)


def save_checkpoint(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`save_checkpoint` of both workers: save the scale, its growth counter and the step counters with the model."""
    return save_with_scaler(_step_of(worker), wrapped, args, kwargs)


def load_checkpoint(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`load_checkpoint` of both workers: go on with the saved scale; its factors and interval are the plan's."""
    return load_with_scaler(_step_of(worker), wrapped, args, kwargs)


def refuse_supervised(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPSFTTrainer.__init__`: refuse it under a plan, as it computes in bfloat16 and scales no loss."""
    if current_plan().overrides_dtype:
        reason = "verl's SFT trainer of this release computes in bfloat16 and scales no loss"
        raise PlanError([Conflict("verl.trainer.fsdp_sft_trainer", "started", reason, "set FP16_PATCH=off for it")])
    return wrapped(*args, **kwargs)


def refuse_engine(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPEngine.__init__` before 0.8.0: refuse it, as it computes in bfloat16 and scales no loss."""
    if current_plan().overrides_dtype:
        raise PlanError([verl_config.ENGINE_CONFLICT])
    return wrapped(*args, **kwargs)


def _force_precision(fsdp_config: Any, *, trains: bool) -> None:
    plan = current_plan()
    if not plan.overrides_dtype:
        return
    configured = fsdp_config.get("model_dtype", None) or ("float32" if trains else _HALF_IF_UNSET)
    verl_config.force_settings(
        fsdp_config,
        dtype=plan.dtype,
        mixed_precision=verl_config.mixed_precision(plan),
        model_dtype=verl_config.stored_dtype(configured, trains=trains, plan=plan),
    )


def _restore_rope(module: Any, key: str, fix: str) -> None:
    plan = current_plan()
    if plan.overrides_dtype:
        rope.restore(module, key, plan.dtype, fix)


def _watch(module: Any, role: str) -> None:
    ledger().rank = torch.distributed.get_rank()
    watch_compute(module, role)


def _step_of(worker: Any) -> LearnerStep | None:
    # A worker that only samples has an actor's model and no actor.
    learner = getattr(worker, "actor", None) or getattr(worker, "critic", None)
    return None if learner is None else LearnerStep.of(learner)


@contextmanager
def _held_schedule(schedule: Any, learner: Any) -> Iterator[None]:
    # For the call only: what a schedule holds goes into verl's checkpoints.
    schedule.step = HeldScheduleStep(schedule.step, learner)
    try:
        yield
    finally:
        del schedule.step
