"""Finds the servers that a run of verl samples with, scores by and learns from, and what of them is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fp16_patch.plan.dtypes import BFLOAT16, spelling_of
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import Plan
from fp16_patch.verl.config.selection import select as _select
from fp16_patch.vllm.expert_communication import ARGUMENT as ALL2ALL
from fp16_patch.vllm.expert_communication import expert_communication_conflict

SUPPORTED = ("vllm",)
TEACHER = "teacher"

ROLLOUT, REWARD = "actor_rollout_ref.rollout", "reward.reward_model.rollout"
# Where a reward model's settings are up to 0.7.0; later releases take them over from there, where they are set.
_FORMER_REWARD = "reward_model"
_TEACHERS = "distillation.teacher_models"
# verl drops the teacher of its defaults where the run names others.
_DEFAULT_TEACHER = "teacher_model"


class Sampler(NamedTuple):
    """One model that is served.

    Attributes:
        role: what doctor and reports call it.
        section: key of its `RolloutConfig`.
        model: key of the path of its model.
        former: key of another section, whose values go before those of `section`.
    """

    role: str
    section: str
    model: str
    former: str | None = None

    def setting(self, config: Any, name: str) -> tuple[str, Any]:
        """Return the key and the value of one of its settings, from where it is set."""
        keys = [f"{section}.{name}" for section in (self.former, self.section) if section]
        found = ((key, value) for key in keys if (value := _select(config, key)) is not None)
        return next(found, (keys[-1], None))


def samplers(config: Any) -> list[Sampler]:
    """Return whatever this run starts servers for: its policy, its reward model, its teachers."""
    policy = Sampler("rollout", ROLLOUT, "actor_rollout_ref.model.path")
    return [policy, *_reward_models(config), *_teachers(config)]


def samples_with_vllm(config: Any) -> bool:
    """Return whether one of the run's servers is vLLM's."""
    return any(sampler.setting(config, "name")[1] == "vllm" for sampler in samplers(config))


def has_reward_worker(config: Any) -> bool:
    """Return whether a reward model is scored by a learner's worker, as up to 0.7.0, and not served."""
    enabled, served = (_select(config, f"{_FORMER_REWARD}.{name}") for name in ("enable", "use_reward_loop"))
    return bool(enabled) and not served and _select(config, REWARD) is None


def _reward_models(config: Any) -> Iterator[Sampler]:
    former = f"{_FORMER_REWARD}.rollout"
    enabled, path = (_select(config, f"{_FORMER_REWARD}.{name}") for name in ("enable", "model.path"))
    if _select(config, REWARD) is None:
        if enabled and not has_reward_worker(config):
            yield Sampler("reward", former, f"{_FORMER_REWARD}.model.path")
    elif enabled or (enabled is None and _select(config, "reward.reward_model.enable")):
        model = f"{_FORMER_REWARD}.model.path" if path is not None else "reward.reward_model.model_path"
        yield Sampler("reward", REWARD, model, former)


def _teachers(config: Any) -> Iterator[Sampler]:
    if not _select(config, "distillation.enabled"):
        return
    names = list(_select(config, _TEACHERS) or ())
    several = [name for name in names if name != _DEFAULT_TEACHER]
    for name in several or names:
        role = f"{TEACHER} {name}" if several else TEACHER
        yield Sampler(role, f"{_TEACHERS}.{name}.inference", f"{_TEACHERS}.{name}.model_path")


def sampler_conflicts(config: Any, sampler: Sampler, plan: Plan) -> Iterator[Conflict]:
    """Yield the settings of a server that cannot be had under the plan; those of its model apart."""
    key, name = sampler.setting(config, "name")
    if name is None:
        yield Conflict(key, None, "no sampler is named", f"add {key}={SUPPORTED[0]}")
    elif name not in SUPPORTED:
        fix = f"use {' or '.join(SUPPORTED)}, or FP16_PATCH=observe to measure without changing"
        yield Conflict(key, name, "fp16_patch cannot vouch for this sampler", fix)
    for setting in ("quantization", "quantization_config_file"):
        key, value = sampler.setting(config, setting)
        if value:
            yield Conflict(key, value, f"a quantized sampler is not {plan.dtype}", "set it to null")
    # These go to vLLM's command line after everything else, past the rollout's own dtype.
    key, arguments = sampler.setting(config, "engine_kwargs.vllm")
    for argument, value in dict(arguments or {}).items():
        if reason := _spoilt_by(argument, value, plan):
            yield Conflict(f"{key}.{argument}", value, reason, "remove it")
        elif _spelled(argument) == ALL2ALL and (
            other := expert_communication_conflict(f"{key}.{argument}", value, plan)
        ):
            yield other


def _spoilt_by(argument: str, value: Any, plan: Plan) -> str | None:
    """Return why an argument of vLLM's command line spoils the plan; None if it does not."""
    argument, names = _spelled(argument), spelling_of(plan.dtype).all
    accepted = {"dtype": names, "kv_cache_dtype": ("auto", *names), "distributed_executor_backend": ("mp",)}
    reasons = {
        **dict.fromkeys(("dtype", "kv_cache_dtype"), f"it overrides the plan's {plan.dtype}"),
        "distributed_executor_backend": "its workers are not processes we know how to ask",
        "quantization": f"a quantized sampler is not {plan.dtype}",
    }
    is_set = value if argument == "quantization" else value is not None
    return reasons.get(argument) if is_set and str(value) not in accepted.get(argument, ()) else None


def _spelled(argument: str) -> str:
    # vLLM takes either.
    return argument.replace("-", "_")


def stock_dtype(config: Any, sampler: Sampler) -> str:
    """Return the setting that decides what a server computes in where no plan does."""
    given = (sampler.setting(config, name)[1] for name in ("engine_kwargs.vllm.dtype", "dtype"))
    return str(next(filter(None, given), BFLOAT16.torch))
