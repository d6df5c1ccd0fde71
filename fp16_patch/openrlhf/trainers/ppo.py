"""Hooks into OpenRLHF's PPO trainers: checks every process before the first update, and records steps."""

from __future__ import annotations

from typing import Any

from fp16_patch.openrlhf.deepspeed.engines import inner
from fp16_patch.openrlhf.deepspeed.step_report import train_and_report
from fp16_patch.openrlhf.trainers.driver import OpenRLHFDriver
from fp16_patch.openrlhf.trainers.lags import PolicyVersions
from fp16_patch.openrlhf.trainers.observation import has_sampler_log_probs, observe_buffer
from fp16_patch.patching.call_arguments import argument

_ACTOR_TRAINED = "actor_lr"


def init(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.__init__`: open the record, and have the engines watch their first rollout."""
    _drop_copies(type(trainer))
    result = wrapped(*args, **kwargs)
    if hasattr(trainer, "generate_samples"):
        return result  # up to 0.9.0, beside the one that trains, one that only has samples generated
    driver = OpenRLHFDriver.of(trainer)
    driver.begin()
    driver.request_attestations()
    driver.follow_versions()
    return result


def make_experience(wrapped: Any, maker: Any, args: Any, kwargs: Any) -> Any:
    """`RemoteExperienceMaker.make_experience`: expect the ranks to observe these tokens when they train on them."""
    experiences = wrapped(*args, **kwargs)
    driver = OpenRLHFDriver.running()
    if driver is not None and driver.measures:
        measurable = [experience for experience in experiences if has_sampler_log_probs(experience)]
        driver.expect(sum(int(experience.action_mask.sum()) for experience in measurable))
    return experiences


def ppo_train(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.ppo_train`: check every process before the update."""
    return OpenRLHFDriver.of(trainer).update(_steps_before(wrapped, args, kwargs) + 1, wrapped, args, kwargs)


def whole_step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.ppo_train` up to 0.9.0, a whole step: check every process before it, and put it on record."""
    step = _steps_before(wrapped, args, kwargs)
    status = OpenRLHFDriver.of(trainer).update(step, wrapped, args, kwargs)
    _record(trainer, step, status)
    return status


def train_step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.train_step`: add our metrics to OpenRLHF's status, and put the step on record."""
    status, step = wrapped(*args, **kwargs)
    _record(trainer, step, status)
    return status, step


def save_logs_and_checkpoints(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`BasePPOTrainer.save_logs_and_checkpoints`, a step's end: write the record, as the job ends without notice."""
    result = wrapped(*args, **kwargs)
    OpenRLHFDriver.of(trainer).flush()
    return result


def train_actor(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`ActorPPOTrainer.ppo_train`: observe what it trains on, and add what becomes of its steps to the status."""
    observe_buffer(trainer)
    status = train_and_report("actor", "fp16/", inner(trainer.actor), lambda: wrapped(*args, **kwargs))
    if status["fp16/step_skipped"] < 1:
        PolicyVersions.of(trainer).updated()
    return status


def train_critic(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`CriticPPOTrainer.ppo_train`: add what becomes of its steps to the status."""
    return train_and_report("critic", "fp16/critic/", inner(trainer.critic), lambda: wrapped(*args, **kwargs))


def _steps_before(wrapped: Any, args: Any, kwargs: Any) -> int:
    return int(argument(wrapped, args, kwargs, "global_steps"))


def _record(trainer: Any, step: int, status: dict[str, Any]) -> None:
    # The ranks count a round where the actor trains, so not while it is frozen.
    OpenRLHFDriver.of(trainer).end_step(step, status, observed=_ACTOR_TRAINED in status)


def _drop_copies(actor_class: Any) -> None:
    """Let a Ray actor's class inherit what we wrapped: Ray copies every inherited method when it makes the class."""
    from openrlhf.trainer.ppo_trainer import BasePPOTrainer

    for name, method in vars(BasePPOTrainer).items():
        copy = vars(actor_class).get(name)
        if hasattr(method, "__wrapped__") and getattr(copy, "__qualname__", None) == f"BasePPOTrainer.{name}":
            setattr(actor_class, name, method)
