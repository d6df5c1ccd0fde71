"""What the trainers' hooks share: the run is checked and begun, its processes are judged, its steps go on record."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.record.reading import LEDGER, PLAN
from fp16_patch.mismatch.run_monitor import RunMonitor
from fp16_patch.runtime.activation import current_plan, ledger, refine
from fp16_patch.runtime.preflight import Census
from fp16_patch.verl.config import settings as verl_config
from fp16_patch.verl.trainers.observation import ORDER

logger = logging.getLogger(__name__)

_CENSUS = "_fp16_patch_census"
_OUTCOME_SUFFIXES = ("/min", "/max")
_monitor: RunMonitor | None = None


def begin(trainer: Any, kind: str) -> None:
    """The run's configuration has been read and no worker has been started: plan and configuration meet.

    Args:
        kind: of this process; the patches that must be live in it go by it.

    Raises:
        PlanError: a setting is wrong, or cannot be had under the plan.
    """
    global _monitor
    ledger().kind = kind
    prepare(trainer.config)
    _monitor = RunMonitor(current_plan(), _out_dir(trainer.config))
    _monitor.write(PLAN, {"framework": "verl", **_plan_facts(trainer.config)})


@contextmanager
def observed(extra: MutableMapping[str, Any]) -> Iterator[None]:
    """The ranks are told to observe, by what goes along with the batch, in this pass only."""
    if _monitor is not None and _monitor.measures:
        extra[ORDER] = json.dumps(_monitor.order)
    try:
        yield
    finally:
        extra.pop(ORDER, None)


def expect(batch: Any) -> None:
    """The ranks must have observed this batch's sampled tokens."""
    if _monitor is not None and _monitor.measures:
        _monitor.expect(int(batch["response_mask"].sum()))


def end_step(step: int, metrics: dict[str, Any]) -> None:
    """Our metrics join verl's, and the step goes on record."""
    rename_outcomes(metrics)
    if _monitor is not None:
        _monitor.end_step(step, metrics)


def flush() -> None:
    """What was recorded reaches the disk before the job's processes end."""
    if _monitor is not None:
        _monitor.flush()


def judged_update(role: str, wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """No update of an engine before every process is judged."""
    judge_processes(trainer)
    result = wrapped(*args, **kwargs)
    _census_of(trainer).updated.add(role)
    return result


def prepare(config: Any) -> None:
    """Refine the plan by the run's own `fp16_patch` settings, check the run under it, write it into the run.

    Raises:
        PlanError: a setting is wrong, or cannot be had under the plan.
    """
    plan = refine(verl_config.plan_settings(config), source=verl_config.SECTION)
    verl_config.check(config, plan)
    changed = verl_config.apply_to(config, plan) if plan.overrides_dtype else []
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
    groups = [getattr(trainer, name, None) for name in ("actor_rollout_wg", "critic_wg", "ref_policy_wg", "rm_wg")]
    workers = [("worker", worker) for group in groups if group is not None for worker in group.workers]
    servers = [("server", server) for server in _servers(trainer)]
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


def _servers(trainer: Any) -> list[Any]:
    """The servers of every sampler that this run has started: hybrid and standalone rollout, reward model, teachers."""
    return [server for manager in _sampler_managers(trainer) for server in _servers_of(manager)]


def _sampler_managers(trainer: Any) -> list[Any]:
    """Whatever the trainer keeps servers in, which differs between trainers and releases; some of it has none."""
    agents, rewards = getattr(trainer, "async_rollout_manager", None), getattr(trainer, "reward_loop_manager", None)
    listed = getattr(trainer, "_rollout_server_managers", None)
    managers = listed() if listed else [getattr(trainer, "llm_server_manager", None), agents]
    managers += [getattr(holder, "reward_model_manager", None) for holder in (rewards, agents)]
    teachers = getattr(trainer, "teacher_model_manager", None)
    return [*managers, *getattr(teachers, "teacher_model_managers", {}).values()]


def _servers_of(manager: Any) -> list[Any]:
    if hasattr(manager, "async_llm_servers"):
        return list(manager.async_llm_servers)
    get = getattr(manager, "get_replicas", None)
    replicas = get() if get is not None else getattr(manager, "rollout_replicas", ())
    return [server for replica in replicas for server in replica.servers]


def _census_of(trainer: Any) -> Census:
    if not hasattr(trainer, _CENSUS):
        setattr(trainer, _CENSUS, Census("verl"))
    return getattr(trainer, _CENSUS)  # type: ignore[no-any-return]


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


def _samples_ahead(config: Any) -> bool:
    # The V0 trainer has the section too, and does not read it.
    v1 = config.trainer.get("v1") if config.trainer.get("use_v1") else None
    return v1 is not None and v1.trainer_mode != "sync"


_CAVEATS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        verl_config.bypasses_old_log_probs,
        "is not measured: algorithm.rollout_correction.bypass_mode takes the sampler's log-probs for the learner's",
    ),
    (
        lambda config: not config.actor_rollout_ref.rollout.get("calculate_log_probs"),
        "is not measured: actor_rollout_ref.rollout.calculate_log_probs=False keeps none of the sampler's log-probs",
    ),
    (
        _samples_ahead,
        "includes the age of the sampler's weights: trainer.v1.trainer_mode is not sync",
    ),
    (
        lambda config: config.actor_rollout_ref.rollout.get("logprobs_mode") != "processed_logprobs",
        "includes the temperature: actor_rollout_ref.rollout.logprobs_mode is not processed_logprobs",
    ),
    (_samples_from_a_part, "includes the renormalization by top_p or top_k, which the learner does not do"),
)
