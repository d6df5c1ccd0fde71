"""The driver: the plan meets the run's configuration, every process is judged, and what happened is recorded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp16_patch import processes
from fp16_patch.activation import attestation, current_plan, ledger, refine
from fp16_patch.census import Census
from fp16_patch.errors import PlanError
from fp16_patch.mismatch.record import LEDGER, PLAN
from fp16_patch.monitoring import RunMonitor
from fp16_patch.verl import config as verl_config
from fp16_patch.verl.observation import ORDER

logger = logging.getLogger(__name__)

_CENSUS = "_fp16_patch_census"
_OUTCOME_SUFFIXES = ("/min", "/max")
_monitor: RunMonitor | None = None


def validate_config(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`validate_config`, the last thing the launching process does before it starts Ray: stop there if it must be."""
    ledger().kind = "driver"
    prepare(kwargs.get("config", args[0] if args else None))
    processes.carry_driver_record(attestation())
    return wrapped(*args, **kwargs)


def init_dataloader(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._init_dataloader`: the configuration has been read, no worker has been started.

    With `external_lib` alone, verl has imported us one call earlier, in this process only.
    """
    global _monitor
    ledger().kind = "task_runner"
    prepare(trainer.config)
    _monitor = RunMonitor(current_plan(), _out_dir(trainer.config))
    _monitor.write(PLAN, {"framework": "verl", **_plan_facts(trainer.config)})
    return wrapped(*args, **kwargs)


def refuse_v0(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer.__init__`: the V0 trainer never asks its processes, so it may not run under a plan."""
    if current_plan().changes:
        raise PlanError([verl_config.V0_CONFLICT])
    return wrapped(*args, **kwargs)


def update_actor(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._update_actor`: no update before every process is judged."""
    return _judged_update("actor", wrapped, trainer, args, kwargs)


def update_critic(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._update_critic`: as for the actor; the critic is updated first."""
    return _judged_update("critic", wrapped, trainer, args, kwargs)


def compute_old_log_prob(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._compute_old_log_prob`: the ranks are told to observe, with this batch and in this pass only."""
    batch = kwargs["batch"] if "batch" in kwargs else args[0]
    if _monitor is not None and _monitor.measures:
        batch.extra_info[ORDER] = json.dumps(_monitor.order)
    try:
        return wrapped(*args, **kwargs)
    finally:
        batch.extra_info.pop(ORDER, None)


def calculate_debug_metrics(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`calculate_debug_metrics`, where verl has the tokens just scored: how many the ranks must have observed."""
    metrics: dict[str, Any] = wrapped(*args, **kwargs)
    if _monitor is not None and _monitor.measures:
        batch = kwargs.get("data", args[0] if args else None).batch
        _monitor.expect(int(batch["response_mask"].sum()))
    return metrics


def compute_metrics(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._compute_metrics`, the end of a step: our metrics join verl's, and the step goes on record."""
    result = wrapped(*args, **kwargs)
    metrics = kwargs["metrics"] if "metrics" in kwargs else args[1]
    rename_outcomes(metrics)
    if _monitor is not None:
        _monitor.end_step(trainer.global_steps, metrics)
    return result


def fit(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer.fit`: what was recorded reaches the disk before the job's processes end."""
    try:
        return wrapped(*args, **kwargs)
    finally:
        if _monitor is not None:
            _monitor.flush()


def prepare(config: Any) -> None:
    """Refine the plan by the run's own `fp16_patch` settings, check the run under it, write it into the run.

    Raises:
        PlanError: a setting is wrong, or cannot be had under the plan.
    """
    plan = refine(verl_config.plan_settings(config), source=verl_config.SECTION)
    verl_config.check(config, plan)
    changed = verl_config.apply_to(config, plan) if plan.changes else []
    if changed:
        keys = "\n  ".join(changed)
        logger.warning("every role computes in %s; the configuration said otherwise:\n  %s", plan.dtype, keys)
    for caveat in caveats_of(config):
        logger.warning("the mismatch of this run: %s", caveat)


def judge_processes(trainer: Any) -> None:
    """Ask every process, where that is due; `Census.take` says what follows.

    Raises:
        PrecisionError: a process or a dtype is not as planned.
    """
    census = _census_of(trainer)
    if census.due(trainer.global_steps):
        required = required_quantities(trainer, census.updated)
        census.take(trainer.global_steps, actors_of(trainer), required, _publish_ledger)


def actors_of(trainer: Any) -> list[tuple[str, Any]]:
    """Kind and handle of every Ray actor that computes: learners' workers and samplers' servers."""
    groups = [getattr(trainer, name, None) for name in ("actor_rollout_wg", "critic_wg", "ref_policy_wg")]
    workers = [("worker", worker) for group in groups if group is not None for worker in group.workers]
    servers = [("server", server) for replica in _replicas(trainer) for server in replica.servers]
    # Colocated roles share their workers.
    return list({handle._actor_id: (kind, handle) for kind, handle in workers + servers}.values())


def required_quantities(trainer: Any, updated: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Role → quantities that must have been seen by now.

    Args:
        updated: the engines that have taken part in an update.
    """
    config = trainer.config
    computed, trained = ("autocast", "parameter", "activation"), ("gradient", "master")
    generated = () if verl_config.replays_rollouts(config) else ("activation",)
    required: dict[str, tuple[str, ...]] = {"rollout": ("wire", "engine_weight", "kv_cache", *generated)}
    if not verl_config.bypasses_old_log_probs(config) or "actor" in updated:
        required["actor"] = (*computed, "log_prob")
    if trainer.use_reference_policy and not trainer.ref_in_actor:
        required["ref"] = (*computed, "log_prob")
    if trainer.use_critic:
        required["critic"] = (*computed, "value")
    if verl_config.REWARD in verl_config.sampler_sections(config):
        required["reward"] = ("engine_weight",)
    return {role: (*seen, *(trained if role in updated else ())) for role, seen in required.items()}


def caveats_of(config: Any) -> list[str]:
    """What, besides precision, sampler and learner differ in for this configuration, or why nothing is measured."""
    return [caveat for holds, caveat in _CAVEATS if holds(config)]


def rename_outcomes(metrics: dict[str, Any]) -> None:
    """`actor/fp16/loss_scale/min` → `fp16/loss_scale`; the critic's become `fp16/critic/…`.

    The suffix is what verl aggregates by, so it goes last.
    """
    for role, prefix in (("actor", "fp16/"), ("critic", "fp16/critic/")):
        for raw in [name for name in metrics if name.startswith(f"{role}/fp16/")]:
            name = raw.removeprefix(f"{role}/fp16/")
            for suffix in _OUTCOME_SUFFIXES:
                name = name.removesuffix(suffix)
            metrics[prefix + name] = metrics.pop(raw)


def _replicas(trainer: Any) -> list[Any]:
    """Every sampler this run has started: hybrid and standalone rollout, reward model, teachers."""
    replicas = [replica for manager in trainer._rollout_server_managers() for replica in manager.get_replicas()]
    reward = getattr(trainer.reward_loop_manager, "reward_model_manager", None)
    teachers = getattr(trainer.teacher_model_manager, "teacher_model_managers", {})
    for manager in [reward, *teachers.values()]:
        replicas += manager.rollout_replicas if manager is not None else []
    return replicas


def _census_of(trainer: Any) -> Census:
    if not hasattr(trainer, _CENSUS):
        setattr(trainer, _CENSUS, Census("verl"))
    return getattr(trainer, _CENSUS)  # type: ignore[no-any-return]


def _judged_update(role: str, wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    judge_processes(trainer)
    result = wrapped(*args, **kwargs)
    _census_of(trainer).updated.add(role)
    return result


def _publish_ledger(answers: dict[str, Any]) -> None:
    if _monitor is not None:
        _monitor.write(LEDGER, answers)


def _out_dir(config: Any) -> Path:
    return Path(current_plan().out_dir or Path(config.trainer.default_local_dir) / "fp16_patch")


def _plan_facts(config: Any) -> dict[str, Any]:
    plan = current_plan()
    model = str(config.actor_rollout_ref.model.path)
    return {**asdict(plan), "dtype": plan.dtype, "caveats": caveats_of(config), "model": model}


def _samples_from_a_part(config: Any) -> bool:
    rollout = config.actor_rollout_ref.rollout
    return bool(rollout.top_p < 1 or rollout.top_k > 0)


_CAVEATS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        verl_config.bypasses_old_log_probs,
        "is not measured: algorithm.rollout_correction.bypass_mode takes the sampler's log-probs for the learner's",
    ),
    (
        lambda config: not config.actor_rollout_ref.rollout.calculate_log_probs,
        "is not measured: actor_rollout_ref.rollout.calculate_log_probs=False keeps none of the sampler's log-probs",
    ),
    (
        lambda config: config.trainer.v1.trainer_mode != "sync",
        "includes the age of the sampler's weights: trainer.v1.trainer_mode is not sync",
    ),
    (
        lambda config: config.actor_rollout_ref.rollout.logprobs_mode != "processed_logprobs",
        "includes the temperature: actor_rollout_ref.rollout.logprobs_mode is not processed_logprobs",
    ),
    (_samples_from_a_part, "includes the renormalization by top_p or top_k, which the learner does not do"),
)
