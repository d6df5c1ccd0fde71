"""The PPO trainer: every process is judged before the first update, and what happened is recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.collection import actors
from fp16_patch.mismatch.record.reading import LEDGER, PLAN
from fp16_patch.mismatch.run_monitor import RunMonitor
from fp16_patch.openrlhf.config.arguments import get
from fp16_patch.openrlhf.deepspeed.engines import inner
from fp16_patch.openrlhf.deepspeed.step_report import train_and_report
from fp16_patch.openrlhf.trainers.observation import has_sampler_log_probs, observe_buffer, samples_hold_log_probs
from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.runtime.preflight import Census
from fp16_patch.vllm import server

logger = logging.getLogger(__name__)

_CENSUS = "_fp16_patch_census"
_ACTOR_TRAINED = "actor_lr"
_GROUPS = {
    "actor": "actor_model_group",
    "critic": "critic_model_group",
    "reward": "reward_model_group",
    "ref": "reference_model_group",
}
_monitor: RunMonitor | None = None


def init(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.__init__`: the record is opened, and the engines are asked to watch their first rollout."""
    global _monitor
    _drop_copies(type(trainer))
    result = wrapped(*args, **kwargs)
    if hasattr(trainer, "generate_samples"):
        return result  # up to 0.9.0, beside the one that trains, one that only has samples generated
    ledger().kind = "task_runner"
    run = trainer.args
    caveats = caveats_of(run)
    for caveat in caveats:
        logger.warning("the mismatch of this run: %s", caveat)
    out_dir = Path(current_plan().out_dir or Path(get(run, "ckpt.path")) / "fp16_patch")
    _monitor = RunMonitor(current_plan(), out_dir, actors.job_run())
    model = get(run, "actor.model_name_or_path")
    plan = {**asdict(current_plan()), "dtype": current_plan().dtype, "caveats": caveats, "model": model}
    _monitor.write(PLAN, {"framework": "openrlhf", **plan})
    server.request_records(trainer.vllm_engines or [])
    return result


def make_experience(wrapped: Any, maker: Any, args: Any, kwargs: Any) -> Any:
    """`RemoteExperienceMaker.make_experience`: how many tokens the ranks must have observed once they train on them."""
    experiences = wrapped(*args, **kwargs)
    if _monitor is not None and _monitor.measures:
        measurable = [experience for experience in experiences if has_sampler_log_probs(experience)]
        _monitor.expect(sum(int(experience.action_mask.sum()) for experience in measurable))
    return experiences


def ppo_train(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.ppo_train`: no update before every process is judged."""
    return _judged_update(wrapped, trainer, args, kwargs, step=_steps_before(wrapped, args, kwargs) + 1)


def whole_step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.ppo_train` up to 0.9.0, a step and its number: the same, and it goes on record."""
    step = _steps_before(wrapped, args, kwargs)
    status = _judged_update(wrapped, trainer, args, kwargs, step)
    _record(step, status)
    return status


def train_step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.train_step`: our metrics join OpenRLHF's status, and the step goes on record."""
    status, step = wrapped(*args, **kwargs)
    _record(step, status)
    return status, step


def save_logs_and_checkpoints(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.save_logs_and_checkpoints`, a step's end: the job's end comes without notice after the last."""
    result = wrapped(*args, **kwargs)
    if _monitor is not None:
        _monitor.flush()
    return result


def train_actor(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`ActorPPOTrainer.ppo_train`: what it trains on is observed, what becomes of its steps goes into the status."""
    observe_buffer(trainer)
    return train_and_report("actor", "fp16/", inner(trainer.actor), lambda: wrapped(*args, **kwargs))


def train_critic(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`CriticPPOTrainer.ppo_train`: as for the actor."""
    return train_and_report("critic", "fp16/critic/", inner(trainer.critic), lambda: wrapped(*args, **kwargs))


def actors_of(trainer: Any) -> list[tuple[str, Any]]:
    """Kind and handle of every Ray actor that computes: the learners' ranks and the samplers' servers."""
    groups = [getattr(trainer, attribute) for attribute in _GROUPS.values()]
    workers = [("worker", worker) for group in groups if group is not None for worker in group._actor_handlers]
    return workers + [("server", engine) for engine in trainer.vllm_engines or []]


def required_quantities(trainer: Any, updated: set[str]) -> dict[str, tuple[str, ...]]:
    """Role → quantities that must have been seen by now.

    Args:
        updated: the roles that have taken part in an update.
    """
    computed, trained = ("parameter", "activation"), ("gradient", "master")
    synced = ("wire",) if "actor" in updated else ()
    required: dict[str, tuple[str, ...]] = {"rollout": ("engine_weight", "kv_cache", "activation", *synced)}
    for role, attribute in _GROUPS.items():
        if getattr(trainer, attribute) is not None:
            output = "log_prob" if role in ("actor", "ref") else "value"
            required[role] = (*computed, output, *(trained if role in updated else ()))
    if not trainer.vllm_engines:
        del required["rollout"]
    return required


def caveats_of(args: Any) -> list[str]:
    """What, besides precision, sampler and learner differ in under these arguments."""
    return [caveat for holds, caveat in _CAVEATS if holds(args)]


def _steps_before(wrapped: Any, args: Any, kwargs: Any) -> int:
    return int(argument(wrapped, args, kwargs, "global_steps"))


def _judged_update(wrapped: Any, trainer: Any, args: Any, kwargs: Any, step: int) -> Any:
    census = _census_of(trainer)
    if census.due(step):
        engines = trainer.vllm_engines or []
        server.refresh_records(engines)
        census.take(step, actors_of(trainer), required_quantities(trainer, census.updated), _publish_ledger)
    status = wrapped(*args, **kwargs)
    census.updated |= {role for role in ("actor", "critic") if f"{role}_lr" in status}
    return status


def _record(step: int, status: dict[str, Any]) -> None:
    if _monitor is not None:
        # The ranks count a round where the actor trains, so not while it is frozen.
        (_monitor.end_step if _ACTOR_TRAINED in status else _monitor.pass_step)(step, status)


def _drop_copies(actor_class: Any) -> None:
    """Let a Ray actor's class inherit what we wrapped: Ray copies every inherited method when it makes the class."""
    from openrlhf.trainer.ppo_trainer import BasePPOTrainer

    for name, method in vars(BasePPOTrainer).items():
        copy = vars(actor_class).get(name)
        if hasattr(method, "__wrapped__") and getattr(copy, "__qualname__", None) == f"BasePPOTrainer.{name}":
            setattr(actor_class, name, method)


def _census_of(trainer: Any) -> Census:
    if not hasattr(trainer, _CENSUS):
        setattr(trainer, _CENSUS, Census("openrlhf"))
    return getattr(trainer, _CENSUS)  # type: ignore[no-any-return]


def _publish_ledger(answers: dict[str, Any]) -> None:
    if _monitor is not None:
        _monitor.write(LEDGER, answers)


_CAVEATS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda args: get(args, "train.async_enable"),
        "includes the age of the sampler's weights: training is asynchronous",
    ),
    (
        lambda args: get(args, "rollout.top_p") < 1,
        "includes the renormalization by top_p, which the learner does not do",
    ),
    (
        lambda args: not samples_hold_log_probs(),
        "is not measured: up to 0.8.8, OpenRLHF's samples do not hold the sampler's log-probs",
    ),
)
