"""Finds the servers that a run of verl samples with, scores by and learns from, and what of them is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from packaging.version import Version

from fp16_patch.patching.declarations import installed_release
from fp16_patch.plan.dtypes import BFLOAT16
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import Plan
from fp16_patch.samplers.sampler import Sampler
from fp16_patch.sglang.sampler import SGLANG
from fp16_patch.verl.config.selection import select as _select
from fp16_patch.vllm.sampler import VLLM

SUPPORTED: dict[str, Sampler] = {sampler.name: sampler for sampler in (VLLM, SGLANG)}
TEACHER = "teacher"

ROLLOUT, REWARD = "actor_rollout_ref.rollout", "reward.reward_model.rollout"
# Where a reward model's settings are up to 0.7.0; later releases take them over from there, where they are set.
_FORMER_REWARD = "reward_model"
_TEACHERS = "distillation.teacher_models"
# verl's first release that takes an SGLang with plugins.
_FIRST_WITH_PLUGINS = "0.8.0"
# verl drops the teacher of its defaults where the run names others.
_DEFAULT_TEACHER = "teacher_model"


class Served(NamedTuple):
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

    def sampler(self, config: Any) -> Sampler | None:
        """Return what serves it; None if that is no sampler we know."""
        return SUPPORTED.get(str(self.setting(config, "name")[1]))


_POLICY = Served("rollout", ROLLOUT, "actor_rollout_ref.model.path")


def served_models(config: Any) -> list[Served]:
    """Return whatever this run starts servers for: its policy, its reward model, its teachers."""
    return [_POLICY, *_reward_models(config), *_teachers(config)]


def policy_sampler(config: Any) -> Sampler | None:
    """Return what the run's policy samples with; None if that is no sampler we know."""
    return _POLICY.sampler(config)


def samplers_of(config: Any) -> list[Sampler]:
    """Return what the run's servers are, as far as we know it: each sampler once."""
    known = (served.sampler(config) for served in served_models(config))
    return list(dict.fromkeys(sampler for sampler in known if sampler is not None))


def has_reward_worker(config: Any) -> bool:
    """Return whether a reward model is scored by a learner's worker, as up to 0.7.0, and not served."""
    enabled, served = (_select(config, f"{_FORMER_REWARD}.{name}") for name in ("enable", "use_reward_loop"))
    return bool(enabled) and not served and _select(config, REWARD) is None


def _reward_models(config: Any) -> Iterator[Served]:
    former = f"{_FORMER_REWARD}.rollout"
    enabled, path = (_select(config, f"{_FORMER_REWARD}.{name}") for name in ("enable", "model.path"))
    if _select(config, REWARD) is None:
        if enabled and not has_reward_worker(config):
            yield Served("reward", former, f"{_FORMER_REWARD}.model.path")
    elif enabled or (enabled is None and _select(config, "reward.reward_model.enable")):
        model = f"{_FORMER_REWARD}.model.path" if path is not None else "reward.reward_model.model_path"
        yield Served("reward", REWARD, model, former)


def _teachers(config: Any) -> Iterator[Served]:
    if not _select(config, "distillation.enabled"):
        return
    names = list(_select(config, _TEACHERS) or ())
    several = [name for name in names if name != _DEFAULT_TEACHER]
    for name in several or names:
        role = f"{TEACHER} {name}" if several else TEACHER
        yield Served(role, f"{_TEACHERS}.{name}.inference", f"{_TEACHERS}.{name}.model_path")


def sampler_conflicts(config: Any, served: Served, plan: Plan) -> Iterator[Conflict]:
    """Yield the settings of a server that cannot be had under the plan; those of its model apart."""
    key, name = served.setting(config, "name")
    sampler = served.sampler(config)
    if name is None:
        yield Conflict(key, None, "no sampler is named", f"add {key}={next(iter(SUPPORTED))}")
    elif sampler is None:
        fix = f"use {' or '.join(SUPPORTED)}, or FP16_PATCH=observe to measure without changing"
        yield Conflict(key, name, "fp16_patch cannot vouch for this sampler", fix)
    elif refusal := release_conflict(key, sampler):
        yield refusal
    for setting in ("quantization", "quantization_config_file"):
        key, value = served.setting(config, setting)
        if value:
            yield Conflict(key, value, f"a quantized sampler is not {plan.dtype}", "set it to null")
    if sampler is not None:
        # These go to its command line after everything else, past the rollout's own dtype.
        key, arguments = served.setting(config, f"engine_kwargs.{sampler.name}")
        yield from sampler.argument_conflicts(key, dict(arguments or {}), plan)


def release_conflict(key: str, sampler: Sampler) -> Conflict | None:
    """Say why this verl cannot sample with it under a plan; None if it can."""
    release = installed_release("verl")
    if sampler is not SGLANG or release is None or Version(release) >= Version(_FIRST_WITH_PLUGINS):
        return None
    reason = f"verl {release} starts an SGLang whose schedulers load no plugins, so that none of them could be proved"
    return Conflict(key, sampler.name, reason, f"use verl {_FIRST_WITH_PLUGINS} or newer, or vllm")


def stock_dtype(config: Any, served: Served) -> str:
    """Return the setting that decides what a server computes in where no plan does."""
    sampler = served.sampler(config)
    names = ([f"engine_kwargs.{sampler.name}.dtype"] if sampler else []) + ["dtype"]
    given = (served.setting(config, name)[1] for name in names)
    return str(next(filter(None, given), BFLOAT16.torch))
