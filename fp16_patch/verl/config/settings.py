"""Brings verl's configuration under the plan: forces settings, refuses others, and finds the plan's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from fp16_patch.patching.sources import installed_file
from fp16_patch.plan import probe_settings
from fp16_patch.plan.dtypes import is_half, torch_name
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.activation import current_plan
from fp16_patch.runtime.slow_experts import slow_experts
from fp16_patch.samplers.models import model_conflicts
from fp16_patch.verl.config.fused_kernels import fused_kernel_conflict
from fp16_patch.verl.config.kernel_limits import attention_conflicts
from fp16_patch.verl.config.samplers import (
    has_reward_worker,
    sampler_conflicts,
    samplers_of,
    served_models,
    stock_dtype,
)
from fp16_patch.verl.config.selection import Select
from fp16_patch.verl.config.selection import select as _select
from fp16_patch.verl.config.stock_dtypes import learner_dtype
from fp16_patch.verl.config.supported_engines import (
    FSDP,
    MEGATRON,
    VEOMNI,
    conflicts_of_role,
    engine_conflict,
)
from fp16_patch.verl.config.weight_sync import SEPARATE_SAMPLERS, weight_sync_conflicts

logger = logging.getLogger(__name__)

SECTION = "fp16_patch"

ACTOR, REF, CRITIC = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic"
# A reward model that is a learner's worker, before 0.8.0.
_REWARD_WORKER = "reward_model"
_ENGINE_CONFIG = {ACTOR: f"{ACTOR}.fsdp_config", REF: f"{REF}.fsdp_config", CRITIC: f"{CRITIC}.fsdp"}
# Where it is before 0.8.0.
_LEGACY_CRITIC_CONFIG = f"{CRITIC}.model.fsdp_config"

ENGINE_CONFLICT = Conflict(
    "trainer.use_legacy_worker_impl",
    "disable",
    "verl's engine of this release computes in bfloat16 and scales no loss",
    "use auto, or verl 0.8.0 or newer",
)


def mixed_precision(plan: Plan) -> dict[str, str]:
    """Return FSDP's mixed precision: forward and backward in the plan's dtype, reductions and buffers in FP32."""
    return {"param_dtype": str(plan.dtype), "reduce_dtype": "float32", "buffer_dtype": "float32"}


def fsdp_engine_config(wrapped: Any, config: Any, args: Any, kwargs: Any) -> None:
    """`FSDPEngineConfig.__post_init__`: give actor, ref and critic the plan's dtype, whatever their keys say."""
    wrapped(*args, **kwargs)
    plan = current_plan()
    if not plan.overrides_dtype:
        return
    force(config, dtype=plan.dtype, mixed_precision=mixed_precision(plan), model_dtype=_storage_dtype(config, plan))


def rollout_config(wrapped: Any, config: Any, args: Any, kwargs: Any) -> None:
    """`RolloutConfig.__post_init__`: give rollout and reward-model servers the plan's dtype."""
    wrapped(*args, **kwargs)
    plan = current_plan()
    if plan.overrides_dtype:
        force(config, dtype=plan.dtype)


def force(config: Any, **values: Any) -> None:
    """Set fields of a verl dataclass that is frozen once built."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


def force_settings(section: Any, **values: Any) -> None:
    """Set keys of a part of verl's configuration, which is a frozen dataclass or still a `DictConfig`."""
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(section, DictConfig):
        force(section, **values)
        return
    for name, value in values.items():
        OmegaConf.update(section, name, value, force_add=True)


def _storage_dtype(config: Any, plan: Plan) -> str:
    # Parameters that an optimizer updates are FP32 masters: AdamW in FP16 divides by an epsilon that is zero there.
    return stored_dtype(config.model_dtype, trains=not config.forward_only, plan=plan)


def stored_dtype(configured: object, *, trains: bool, plan: Plan) -> str:
    """Return the dtype parameters are kept in, apart from the dtype they are computed in."""
    return str(plan.dtype) if not trains and is_half(configured) else "float32"


def plan_settings(config: Any) -> dict[str, Any]:
    """Return the `fp16_patch.*` settings that ride in a run's configuration (`+fp16_patch.init_scale=1024`)."""
    section = _select(config, SECTION)
    return dict(section) if isinstance(section, Mapping) or hasattr(section, "items") else {}


def check(config: Any, plan: Plan) -> None:
    """Stop before anything is started if a setting of the run cannot be had under the plan.

    Raises:
        PlanError: with every such setting, its value and the fix.
    """
    conflicts = list(conflicts_of(config, plan)) if plan.overrides_dtype else []
    if conflicts:
        raise PlanError(conflicts)


def conflicts_of(config: Any, plan: Plan) -> Iterator[Conflict]:
    """Yield the settings of a composed verl configuration that cannot be had under the plan."""
    select = partial(_select, config)
    yield from _engine_conflicts(config, plan)
    for served in served_models(config):
        yield from sampler_conflicts(config, served, plan)
    for sampler in samplers_of(config):
        yield from sampler.environment_conflicts(plan)
    yield from weight_sync_conflicts(select, plan)
    yield from _model_conflicts(config, plan)
    yield from _kernel_conflicts(config, plan)
    if select("trainer.use_legacy_worker_impl") == "disable" and has_legacy_workers():
        yield ENGINE_CONFLICT
    if fused := fused_kernel_conflict(select, select(f"{ACTOR}.strategy"), plan):
        yield fused


def has_legacy_workers() -> bool:
    """Return whether the installed verl has workers beside its engines: from 0.8.0 on it ignores the switch."""
    return installed_file("verl.workers.fsdp_workers") is not None


def slow_paths_of(config: Any, plan: Plan) -> list[str]:
    """Say what of a composed verl configuration will be slow under the plan."""
    on_fsdp = [role for role, _ in _engine_sections(config) if _select(config, f"{role}.strategy") in FSDP]
    keys = dict.fromkeys("critic.model.path" if role == CRITIC else "actor_rollout_ref.model.path" for role in on_fsdp)
    return list(slow_experts([(key, _select(config, key)) for key in keys], plan))


def _kernel_conflicts(config: Any, plan: Plan) -> Iterator[Conflict]:
    select = partial(_select, config)
    on_fsdp = [role for role, _ in _engine_sections(config) if select(f"{role}.strategy") in FSDP]
    yield from attention_conflicts(select, on_fsdp, plan)


def _engine_conflicts(config: Any, plan: Plan) -> Iterator[Conflict]:
    for role, engine_config in _engine_sections(config):
        yield from conflicts_of_role(partial(_select, config), role, engine_config, plan, trains=role != REF)
    if has_reward_worker(config) and (
        other := engine_conflict(_REWARD_WORKER, _select(config, f"{_REWARD_WORKER}.strategy"))
    ):
        yield other


def _model_conflicts(config: Any, plan: Plan) -> Iterator[Conflict]:
    samplers = {served.model: served.sampler(config) for served in served_models(config)}
    trained = {"critic.model.path"} if uses_critic(config) else set()
    if has_reward_worker(config):
        trained.add(f"{_REWARD_WORKER}.model.path")
    for key in sorted(samplers.keys() | trained):
        yield from model_conflicts(key, _select(config, key), plan, sampler=samplers.get(key))
    policy = "actor_rollout_ref.model.path"
    if plan.scales_loss and (other := probe_settings.conflict_with(plan.probe, policy, _select(config, policy))):
        yield other


def apply_to(config: Any, plan: Plan) -> list[str]:
    """Write the plan into a composed configuration, so that what is logged is what is computed.

    Returns:
        One line for each key that said something else, `key: before → after`.
    """
    return write(config, _forced_keys(config, plan))


def write(config: Any, forced: Mapping[str, Any]) -> list[str]:
    """Write values into a composed configuration, and return one line for each key that said something else."""
    from omegaconf import OmegaConf

    changed = []
    for key, after in forced.items():
        before = _select(config, key)
        if before != after and not _same_dtype(before, after):
            changed.append(f"{key}: {before} → {after}")
        OmegaConf.update(config, key, after, force_add=True)
    return changed


def effective_dtypes(config: Any, plan: Plan) -> dict[str, str]:
    """Map each role to the dtype it computes in, with the plan or (mode `observe`) without it."""
    learners = _engine_sections(config)
    if has_reward_worker(config):
        learners.append((_REWARD_WORKER, f"{_REWARD_WORKER}.{MEGATRON}"))
    roles = {_role_of(key): plan.dtype or _stock_dtype(config, key, section) for key, section in learners}
    sampled = {served.role: plan.dtype or torch_name(stock_dtype(config, served)) for served in served_models(config)}
    return {**roles, **sampled}


def _stock_dtype(config: Any, role: str, engine_config: str) -> str:
    strategy = _select(config, f"{role}.strategy")
    return learner_dtype(partial(_select, config), _role_of(role), strategy, engine_config)


def _role_of(key: str) -> str:
    """Name a role as reports do: `actor`, of `actor_rollout_ref.actor`."""
    return key.rpartition(".")[2].removesuffix("_model")


def uses_critic(config: Any) -> bool:
    enabled = _select(config, "critic.enable")
    return bool(enabled) if enabled is not None else _select(config, "algorithm.adv_estimator") == "gae"


def uses_ref(config: Any) -> bool:
    return bool(_select(config, "algorithm.use_kl_in_reward") or _select(config, f"{ACTOR}.use_kl_loss"))


def replays_rollouts(config: Any) -> bool:
    """Return whether the run reads saved rollouts and may never sample."""
    return bool(_select(config, "skip.rollout_tq.enable") or _select(config, "skip.rollout.enable"))


def samples_ahead(config: Any) -> str | None:
    """Return the setting by which samples are drawn with older weights than the learner's; None where none are."""
    for section in SEPARATE_SAMPLERS:
        if _select(config, section) is not None:
            return section
    mode = _select(config, "trainer.v1.trainer_mode")
    # The V0 trainer has the section too, and does not read it.
    return f"trainer.v1.trainer_mode={mode}" if _select(config, "trainer.use_v1") and mode != "sync" else None


def bypasses_old_log_probs(config: Any) -> bool:
    """Return whether the run takes the sampler's log-probs for the learner's: nothing to compare then."""
    return bool(_select(config, "algorithm.rollout_correction.bypass_mode"))


def _engine_sections(config: Any) -> list[tuple[str, str]]:
    roles = [ACTOR, *([REF] if uses_ref(config) else []), *([CRITIC] if uses_critic(config) else [])]
    return [(role, _engine_section(config, role)) for role in roles]


def _engine_section(config: Any, role: str) -> str:
    if (strategy := _select(config, f"{role}.strategy")) in (MEGATRON, VEOMNI):
        return f"{role}.{strategy}"
    legacy_critic = role == CRITIC and _select(config, _LEGACY_CRITIC_CONFIG) is not None
    return _LEGACY_CRITIC_CONFIG if legacy_critic else _ENGINE_CONFIG[role]


def _forced_keys(config: Any, plan: Plan) -> dict[str, Any]:
    forced: dict[str, Any] = {}
    for role, engine_config in _engine_sections(config):
        strategy = _select(config, f"{role}.strategy")
        forced |= forced_of_engine(partial(_select, config), engine_config, strategy, plan, trains=role != REF)
    for served in served_models(config):
        forced[f"{served.section}.dtype"] = plan.dtype
    return forced


def forced_of_engine(select: Select, section: str, strategy: object, plan: Plan, *, trains: bool) -> dict[str, Any]:
    """Return the keys of an engine's settings, at `section`, that say the plan's dtypes, with their values."""
    forced: dict[str, Any] = {}
    if select(f"{section}.dtype") is not None:  # there is no such key before 0.6.1
        forced[f"{section}.dtype"] = plan.dtype
    if strategy == VEOMNI:
        forced[f"{section}.mixed_precision"] = True
    if strategy not in FSDP:
        return forced
    forced[f"{section}.mixed_precision"] = mixed_precision(plan)
    forced[f"{section}.model_dtype"] = stored_dtype(select(f"{section}.model_dtype"), trains=trains, plan=plan)
    no_sync = f"{section}.use_no_sync_for_gradient_accumulation"
    if strategy == "fsdp" and select(no_sync) is not None:
        forced[no_sync] = False
    return forced


def _same_dtype(before: object, after: object) -> bool:
    if before is None or isinstance(after, dict):
        return before is None
    return torch_name(before) == after
