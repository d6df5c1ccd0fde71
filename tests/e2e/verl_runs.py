"""Real runs of verl's command line, and what they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fp16_patch.mismatch.record.reading import load_run
from integration.cpu.arms import record_of
from integration.cpu.launch import RunResult

TIMEOUT_S = 900
STEPS = 2
FP16_PATCH = str(Path(sys.executable).with_name("fp16-patch"))


def finished(result: RunResult) -> RunResult:
    assert result.ok, f"{result.reason}\n{result.tail(60)}"
    assert len(result.steps) == STEPS
    return result


def record(result: RunResult) -> Path:
    return record_of(result.log.parent)


def mean_abs(result: RunResult) -> float:
    """Mean |d| of all tokens that the run's monitor observed, in nats."""
    return float(load_run(record(result)).summary()["mismatch"]["mean_abs"])


def ledger(result: RunResult) -> dict[str, Any]:
    return dict(json.loads((record(result) / "ledger.json").read_text()))


NO_ARGUMENTS: Mapping[str, object] = MappingProxyType({})


def served_reward_model(model: Path, sampler: str, arguments: Mapping[str, object] = NO_ARGUMENTS) -> tuple[str, ...]:
    """The score of a model that a sampler serves, with these arguments and on a device of its own, is the reward."""
    section = "reward.reward_model"
    return (
        f"{section}.enable=True",
        f"{section}.model_path={model}",
        f"{section}.enable_resource_pool=True",
        f"{section}.n_gpus_per_node=1",
        f"{section}.nnodes=1",
        *_served(f"{section}.rollout", sampler, arguments),
        f"reward.custom_reward_function.path={Path(__file__).with_name('scored_by_model.py')}",
        f"reward.custom_reward_function.name=score_of_{sampler}",
        "ray_kwargs.ray_init.num_gpus=2",
    )


def served_teacher(model: Path, sampler: str, arguments: Mapping[str, object] = NO_ARGUMENTS) -> tuple[str, ...]:
    """Besides by rewards, the policy learns from the log-probs of a model that is served like a reward model."""
    teacher = "distillation.teacher_models.teacher_model"
    return (
        "distillation.enabled=True",
        "distillation.n_gpus_per_node=1",
        "distillation.nnodes=1",
        f"{teacher}.model_path={model}",
        f"{teacher}.num_replicas=1",
        *_served(f"{teacher}.inference", sampler, arguments),
        "ray_kwargs.ray_init.num_gpus=2",
    )


def _served(section: str, sampler: str, arguments: Mapping[str, object]) -> tuple[str, ...]:
    return (
        f"{section}.name={sampler}",
        f"{section}.tensor_model_parallel_size=1",
        f"{section}.max_model_len=64",
        f"{section}.max_num_seqs=32",
        f"{section}.max_num_batched_tokens=512",
        # As for the rollout: on a CPU it cannot sleep.
        f"{section}.free_cache_engine=False",
        f"+{section}.enable_sleep_mode=False",
        *(f"+{section}.engine_kwargs.{sampler}.{name}={value}" for name, value in arguments.items()),
    )
