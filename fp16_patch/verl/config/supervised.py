"""The configuration of verl's SFT trainers under a plan: the one engine of a run, judged as PPO's actor is.

What judges PPO's actor asks for PPO's keys. It is given a view of this configuration by those keys, and what it says
is put into the keys that are typed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from fp16_patch.plan import probe_settings
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.slow_experts import slow_experts
from fp16_patch.samplers.models import model_conflicts
from fp16_patch.verl.config import settings
from fp16_patch.verl.config.fused_kernels import fused_kernel_conflict
from fp16_patch.verl.config.kernel_limits import attention_conflicts
from fp16_patch.verl.config.selection import select as _select
from fp16_patch.verl.config.stock_dtypes import learner_dtype
from fp16_patch.verl.config.supported_engines import FSDP, MEGATRON, VEOMNI, conflicts_of_role

ROLE = "actor"
"""What the ledger and the log call the model: verl's engine does not know which trainer it serves."""

_ENGINE, _MODEL, _OPTIMIZER = "engine", "model", "optim"
_STRATEGY, _PATH = f"{_ENGINE}.strategy", f"{_MODEL}.path"
# Of this class verl's YAML names no strategy.
_OF_MEGATRON = "McoreEngineConfig"
# PPO's sections, each before any that it lies in, and what they are called here.
_SECTIONS = {
    **{f"{settings.ACTOR}.{section}.": f"{_ENGINE}." for section in ("fsdp_config", MEGATRON, VEOMNI)},
    f"{settings.ACTOR}.optim.": f"{_OPTIMIZER}.",
    f"{settings.ACTOR}.": f"{_ENGINE}.",
    "actor_rollout_ref.model.": f"{_MODEL}.",
}
_TOO_OLD = Conflict(
    "command",
    "verl.trainer.sft_trainer",
    settings.ENGINE_CONFLICT.reason,
    "use verl 0.8.0 or newer, or start it without `fp16-patch run`",
)


def is_supervised(config: Any) -> bool:
    """Return whether this is the configuration of an SFT trainer."""
    sections = (_ENGINE, _OPTIMIZER, _MODEL, "data.train_files")
    return all(_select(config, key) is not None for key in sections) and _select(config, "actor_rollout_ref") is None


def check(config: Any, plan: Plan) -> None:
    """Stop before a process group is made if a setting of the run cannot be had under the plan.

    Raises:
        PlanError: with every such setting, its value and the fix.
    """
    conflicts = list(conflicts_of(config, plan)) if plan.overrides_dtype else []
    if conflicts:
        raise PlanError(conflicts)


def conflicts_of(config: Any, plan: Plan) -> Iterator[Conflict]:
    """Yield the settings of a composed configuration that cannot be had under the plan."""
    if settings.has_legacy_workers():
        yield _TOO_OLD
    seen: list[Conflict] = []
    for theirs in _conflicts_by_ppos_keys(config, plan):
        conflict = Conflict(_ours(theirs.key), theirs.value, _ours(theirs.reason), _ours(theirs.fix))
        # PPO has two places for what has one here.
        if conflict not in seen:
            seen.append(conflict)
            yield conflict
    path = _select(config, _PATH)
    yield from model_conflicts(_PATH, path, plan, sampler=None)
    if plan.scales_loss and (other := probe_settings.conflict_with(plan.probe, _PATH, path)):
        yield other


def apply_to(config: Any, plan: Plan) -> list[str]:
    """Write the plan into a composed configuration, so that what is logged is what is computed.

    Returns:
        One line for each key that said something else, `key: before → after`.
    """
    forced = settings.forced_of_engine(partial(_select, config), _ENGINE, _strategy(config), plan, trains=True)
    return settings.write(config, forced)


def effective_dtypes(config: Any, plan: Plan) -> dict[str, str]:
    """Return the dtype that the model computes in, with the plan or (mode `observe`) without it."""
    return {ROLE: plan.dtype or learner_dtype(partial(_select, config), ROLE, _strategy(config), _ENGINE)}


def slow_paths_of(config: Any, plan: Plan) -> list[str]:
    """Say what of a composed configuration will be slow under the plan."""
    on_fsdp = _strategy(config) in FSDP
    return list(slow_experts([(_PATH, _select(config, _PATH))], plan)) if on_fsdp else []


def _conflicts_by_ppos_keys(config: Any, plan: Plan) -> Iterator[Conflict]:
    def select(key: str) -> Any:
        key = _ours(key)
        return strategy if key == _STRATEGY else _select(config, key)

    strategy = _strategy(config)
    yield from conflicts_of_role(select, settings.ACTOR, f"{settings.ACTOR}.fsdp_config", plan, trains=True)
    yield from attention_conflicts(select, [settings.ACTOR] if strategy in FSDP else [], plan)
    if fused := fused_kernel_conflict(select, strategy, plan):
        yield fused


def _strategy(config: Any) -> str | None:
    named: str | None = _select(config, _STRATEGY)
    target = str(_select(config, f"{_ENGINE}._target_"))
    return named or (MEGATRON if target.endswith(_OF_MEGATRON) else None)


def _ours(text: str) -> str:
    for theirs, ours in _SECTIONS.items():
        text = text.replace(theirs, ours)
    return text
