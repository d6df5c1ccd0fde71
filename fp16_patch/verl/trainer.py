"""The driver: the plan meets the run's configuration, every process is judged, and what happened is recorded."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp16_patch import census, processes
from fp16_patch.activation import attestation, current_plan, ledger, refine
from fp16_patch.errors import PlanError, PrecisionError
from fp16_patch.ledger import Record, judge, uniform
from fp16_patch.mismatch.collect import Monitor
from fp16_patch.verl import config as verl_config

logger = logging.getLogger(__name__)

_ASKED = "_fp16_patch_asked_steps"
_OUTCOME_SUFFIXES = ("/min", "/max")
_monitor: Monitor | None = None


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
    _monitor = Monitor(_out_dir(trainer.config))
    _monitor.write("plan.json", {"framework": "verl", **_plan_facts()})
    return wrapped(*args, **kwargs)


def refuse_v0(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer.__init__`: the V0 trainer never asks its processes, so it may not run under a plan."""
    if current_plan().changes:
        raise PlanError([verl_config.V0_CONFLICT])
    return wrapped(*args, **kwargs)


def update_actor(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._update_actor`: no update before every process is judged."""
    judge_processes(trainer)
    return _with_outcome("actor", wrapped, args, kwargs)


def update_critic(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._update_critic`: as for the actor; the critic is updated first."""
    judge_processes(trainer)
    return _with_outcome("critic", wrapped, args, kwargs)


def calculate_debug_metrics(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`calculate_debug_metrics`, where verl has both log-probs of the tokens just sampled."""
    metrics: dict[str, Any] = wrapped(*args, **kwargs)
    if _monitor is not None:
        batch = kwargs.get("data", args[0] if args else None).batch
        _monitor.observe(batch["rollout_log_probs"], batch["old_log_probs"], batch["response_mask"])
    return metrics


def compute_metrics(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._compute_metrics`, the end of a step: our metrics join verl's, and the step goes on record."""
    result = wrapped(*args, **kwargs)
    metrics = kwargs.get("metrics", args[1] if len(args) > 1 else None)
    if _monitor is not None and metrics is not None:
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
    if reason := _unmeasured_because(config):
        logger.warning("the mismatch is not measured in this run: %s", reason)


def judge_processes(trainer: Any) -> None:
    """Ask every process what it is and what it computed in; before the first step, only a clean answer lets it happen.

    Raises:
        PrecisionError: with host, pid, role, quantity, what was seen and what was wanted.
    """
    plan, step = current_plan(), trainer.global_steps
    asked = _asked_steps(trainer)
    if step in asked or not _due(len(asked), step - min(asked, default=step)):
        return
    actors = actors_of(trainer)
    records = [record for record in (processes.driver_record(), attestation()) if record] + census.ask(actors)
    _publish_ledger(records)
    if plan.changes and (findings := judge(records, plan, required_quantities(trainer, trained=bool(asked)))):
        raise PrecisionError(findings)
    if not asked:
        if plan.changes:
            census.clear(actors)
        logger.warning("%d processes attest mode %s: %s", len(records), plan.mode, _summary(records))
    asked.append(step)


def actors_of(trainer: Any) -> list[tuple[str, Any]]:
    """Kind and handle of every Ray actor that computes: learners' workers and samplers' servers."""
    groups = [getattr(trainer, name, None) for name in ("actor_rollout_wg", "critic_wg", "ref_policy_wg")]
    workers = [("worker", worker) for group in groups if group is not None for worker in group.workers]
    servers = [("server", server) for replica in _replicas(trainer) for server in replica.servers]
    # Colocated roles share their workers.
    return list({handle._actor_id: (kind, handle) for kind, handle in workers + servers}.values())


def required_quantities(trainer: Any, *, trained: bool) -> dict[str, tuple[str, ...]]:
    """Role → quantities that must have been seen by now.

    Args:
        trained: an optimizer step has happened.
    """
    config = trainer.config
    computed = ("autocast", "parameter", "activation")
    updated = ("gradient", "master") if trained else ()
    required: dict[str, tuple[str, ...]] = {"rollout": ("wire", "engine_weight", "kv_cache", "activation")}
    if not verl_config.bypasses_old_log_probs(config) or trained:
        required["actor"] = (*computed, "log_prob", *updated)
    if trainer.use_reference_policy and not trainer.ref_in_actor:
        required["ref"] = (*computed, "log_prob")
    if trainer.use_critic:
        required["critic"] = (*computed, "value", *updated)
    if verl_config.REWARD in verl_config.sampler_sections(config):
        required["reward"] = ("engine_weight",)
    return required


def _replicas(trainer: Any) -> list[Any]:
    replicas = list(trainer.llm_server_manager.get_replicas())
    reward = getattr(trainer.reward_loop_manager, "reward_model_manager", None)
    return replicas + (list(reward.rollout_replicas) if reward is not None else [])


def _asked_steps(trainer: Any) -> list[int]:
    if not hasattr(trainer, _ASKED):
        setattr(trainer, _ASKED, [])
    return getattr(trainer, _ASKED)  # type: ignore[no-any-return]


def _due(times_asked: int, steps_since_first: int) -> bool:
    # Gradients exist from the second time on.
    return times_asked < 2 or steps_since_first % current_plan().ledger_every == 0


def _publish_ledger(records: list[Record]) -> None:
    if _monitor is not None:
        _monitor.write("ledger.json", {"processes": records, "roles": uniform(records)})


def _summary(records: list[Record]) -> str:
    return "; ".join(
        f"{role}: " + ", ".join(f"{quantity}={'|'.join(seen)}" for quantity, seen in row.items())
        for role, row in uniform(records).items()
    )


def _with_outcome(role: str, wrapped: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    metrics = kwargs.get("metrics", args[1] if len(args) > 1 else {})
    _rename_outcome(metrics, role)
    return result


def _rename_outcome(metrics: dict[str, Any], role: str) -> None:
    """`actor/fp16/loss_scale/min` → `fp16/loss_scale`; the critic's become `fp16/critic/…`."""
    raw_prefix, prefix = f"{role}/fp16/", "fp16/" if role == "actor" else f"fp16/{role}/"
    for raw in [name for name in metrics if name.startswith(raw_prefix)]:
        name = raw.removeprefix(raw_prefix)
        for suffix in _OUTCOME_SUFFIXES:
            name = name.removesuffix(suffix)
        metrics[prefix + name] = metrics.pop(raw)


def _out_dir(config: Any) -> Path:
    return Path(current_plan().out_dir or Path(config.trainer.default_local_dir) / "fp16_patch")


def _plan_facts() -> dict[str, Any]:
    return {**asdict(current_plan()), "dtype": current_plan().dtype}


def _unmeasured_because(config: Any) -> str | None:
    if verl_config.bypasses_old_log_probs(config):
        return "algorithm.rollout_correction.bypass_mode=True takes the sampler's log-probs for the learner's"
    if not config.actor_rollout_ref.rollout.calculate_log_probs:
        return "actor_rollout_ref.rollout.calculate_log_probs=False keeps none of the sampler's log-probs"
    return None
