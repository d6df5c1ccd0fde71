"""verl's trainers: how each is started, and what it needs to be told besides what all of them are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from integration.cpu.launch import LaunchConfig

Trainer = Literal["sync", "colocate_async", "separate_async", "one_step_off", "fully_async", "main_ppo_sync"]
Settings = dict[str, object]


@dataclass(frozen=True)
class EntryPoint:
    """What is run with ``python -m``, and how it is recognized that training begins."""

    module: str
    settings: Callable[[LaunchConfig], Settings]
    ready: re.Pattern[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def _sync(_config: LaunchConfig) -> Settings:
    # Added where a release has no such section, and unread there.
    return _replay_buffer("AttentiveReplayBuffer")


def _colocate_async(_config: LaunchConfig) -> Settings:
    return {"trainer.v1.trainer_mode": "colocate_async", **_replay_buffer("AttentiveReplayBufferAsync")}


def _separate_async(config: LaunchConfig) -> Settings:
    return {
        "trainer.v1.trainer_mode": "separate_async",
        **_replay_buffer("AttentiveReplayBufferAsync"),
        "trainer.v1.separate_async.parameter_sync_step": config.updates_per_sync,
        # A step, in which verl counts its prompts, ends with a sync.
        "actor_rollout_ref.actor.ppo_mini_batch_size": config.prompts_per_step // config.updates_per_sync,
        "actor_rollout_ref.rollout.nnodes": 1,
        "actor_rollout_ref.rollout.n_gpus_per_node": config.standalone_samplers,
        **_samplers_apart(config),
    }


def _one_step_off(config: LaunchConfig) -> Settings:
    return {
        # By itself it finds its settings from verl's checkout only.
        "hydra.searchpath": "[pkg://verl.trainer.config]",
        "rollout.n_gpus_per_node": config.standalone_samplers,
        **_samplers_apart(config),
    }


def _fully_async(config: LaunchConfig) -> Settings:
    prompts_per_update = config.prompts_per_step // config.updates_per_sync
    return {
        # Prompts come one by one; a run is as long as they last.
        "data.train_batch_size": 0,
        "data.gen_batch_size": 1,
        "rollout.total_rollout_steps": config.steps * config.prompts_per_step,
        "rollout.n_gpus_per_node": config.standalone_samplers,
        "rollout.n": config.responses_per_prompt,
        "actor_rollout_ref.actor.ppo_mini_batch_size": prompts_per_update,
        "async_training.trigger_parameter_sync_step": config.updates_per_sync,
        "async_training.staleness_threshold": 1.0,
        **_samplers_apart(config),
    }


def _main_ppo_sync(_config: LaunchConfig) -> Settings:
    # It adds to the variables of a runtime environment, if one is given, and cannot unless there are some.
    return {"+ray_kwargs.ray_init.runtime_env.env_vars.TRANSFER_QUEUE_ENABLE": "'1'"}


def _replay_buffer(name: str) -> Settings:
    sampler = "++trainer.v1.sampler.custom_sampler"
    return {f"{sampler}.path": "pkg://verl_on_cpu.replay", f"{sampler}.name": name}


def _samplers_apart(config: LaunchConfig) -> Settings:
    """Samplers that share no device with the learner get their weights over verl's checkpoint engine."""
    return {
        "actor_rollout_ref.hybrid_engine": False,
        "actor_rollout_ref.rollout.checkpoint_engine.backend": "gloo",
        "+ray_kwargs.ray_init.num_gpus": config.ranks + config.standalone_samplers,
        # Its actors ask for ten each, which Ray only counts.
        "ray_kwargs.ray_init.num_cpus": 64,
    }


_IN_TRAINING = re.compile(r"Training Progress:")
_V1_READY = re.compile(r"all initialize finished, ready to fit")

ENTRY_POINTS: Mapping[Trainer, EntryPoint] = {
    "sync": EntryPoint("verl.trainer.main_ppo", _sync, _V1_READY),
    "colocate_async": EntryPoint("verl.trainer.main_ppo", _colocate_async, _V1_READY),
    "separate_async": EntryPoint(
        "verl.trainer.main_ppo",
        _separate_async,
        _IN_TRAINING,
        # Without hybrid replicas 0.9.1 stops at a message of level INFO, for an argument that logging does not take.
        {"VERL_LOGGING_LEVEL": "WARN"},
    ),
    "one_step_off": EntryPoint("verl.experimental.one_step_off_policy.main_ppo", _one_step_off, _IN_TRAINING),
    "fully_async": EntryPoint(
        "verl.experimental.fully_async_policy.fully_async_main",
        _fully_async,
        re.compile(r"All components initialized successfully"),
    ),
    "main_ppo_sync": EntryPoint("verl.trainer.main_ppo_sync", _main_ppo_sync, _IN_TRAINING),
}
