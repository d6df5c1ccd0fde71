"""Brings verl's configuration under the plan: forces settings, refuses others, and finds the plan's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fp16_patch.plan import probe_settings
from fp16_patch.plan.dtypes import is_half, spelling_of, torch_name
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.activation import current_plan
from fp16_patch.runtime.slow_experts import slow_experts
from fp16_patch.verl.config.kernel_limits import attention_conflicts, expert_conflicts
from fp16_patch.verl.config.supported_engines import FSDP, MEGATRON, engine_conflict, megatron_conflicts

logger = logging.getLogger(__name__)

SECTION = "fp16_patch"
SAMPLERS = ("vllm",)

ACTOR, REF, CRITIC = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic"
ROLLOUT, REWARD = "actor_rollout_ref.rollout", "reward.reward_model.rollout"
_ENGINE_CONFIG = {ACTOR: f"{ACTOR}.fsdp_config", REF: f"{REF}.fsdp_config", CRITIC: f"{CRITIC}.fsdp"}
# Where it is before 0.8.0.
_LEGACY_CRITIC_CONFIG = f"{CRITIC}.model.fsdp_config"

# verl's wire for weight differences stores bf16 and its vLLM receiver accepts nothing else.
BF16_ONLY_WIRES = ("delta_sharded",)
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
    yield from _engine_conflicts(config, plan)
    yield from _sampler_conflicts(config, plan)
    yield from _model_conflicts(config, plan)
    yield from _kernel_conflicts(config, plan)
    if _select(config, "trainer.use_legacy_worker_impl") == "disable":
        yield ENGINE_CONFLICT
    if _select(config, "actor_rollout_ref.model.use_fused_kernels") and plan.scales_loss:
        yield Conflict(
            "actor_rollout_ref.model.use_fused_kernels",
            True,
            "verl's fused kernels divide by the temperature and return the entropy in float16",
            "set it to false",
        )


def slow_paths_of(config: Any, plan: Plan) -> list[str]:
    """Say what of a composed verl configuration will be slow under the plan."""
    on_fsdp = [role for role, _ in _engine_sections(config) if _select(config, f"{role}.strategy") in FSDP]
    keys = dict.fromkeys("critic.model.path" if role == CRITIC else "actor_rollout_ref.model.path" for role in on_fsdp)
    return list(slow_experts([(key, _select(config, key)) for key in keys], plan))


def _kernel_conflicts(config: Any, plan: Plan) -> Iterator[Conflict]:
    select = partial(_select, config)
    on_fsdp = [role for role, _ in _engine_sections(config) if select(f"{role}.strategy") in FSDP]
    yield from attention_conflicts(select, on_fsdp, plan)
    yield from expert_conflicts(select, sampler_sections(config), plan)


def _engine_conflicts(config: Any, plan: Plan) -> Iterator[Conflict]:
    for role, engine_config in _engine_sections(config):
        strategy = _select(config, f"{role}.strategy")
        conflict = engine_conflict(role, strategy)
        if conflict is not None:
            yield conflict
        elif strategy == MEGATRON:
            yield from megatron_conflicts(partial(_select, config), role, plan, trains=role != REF)
        for qat in (f"{engine_config}.qat.enable", f"{role}.qat.enable"):
            if _select(config, qat):
                reason = "quantization-aware training computes in the quantized dtype"
                yield Conflict(qat, True, reason, "set it to false")


def _sampler_conflicts(config: Any, plan: Plan) -> Iterator[Conflict]:
    for section in sampler_sections(config):
        name = _select(config, f"{section}.name")
        if name not in SAMPLERS:
            fix = f"use {' or '.join(SAMPLERS)}, or FP16_PATCH=observe to measure without changing"
            yield Conflict(f"{section}.name", name, "fp16_patch cannot vouch for this sampler", fix)
        for key in ("quantization", "quantization_config_file"):
            if value := _select(config, f"{section}.{key}"):
                yield Conflict(f"{section}.{key}", value, f"a quantized sampler is not {plan.dtype}", "set it to null")
        yield from _engine_argument_conflicts(config, section, plan)
    wire = _select(config, f"{ROLLOUT}.checkpoint_engine.backend")
    if wire in BF16_ONLY_WIRES and plan.dtype != "bfloat16":
        reason = "it sends weights in bfloat16 and vLLM's side accepts nothing else"
        yield Conflict(f"{ROLLOUT}.checkpoint_engine.backend", wire, reason, "use naive or nccl")


def _engine_argument_conflicts(config: Any, section: str, plan: Plan) -> Iterator[Conflict]:
    # These go to vLLM's command line after everything else, past the rollout's own dtype.
    names = spelling_of(plan.dtype).all
    accepted = {"dtype": names, "kv_cache_dtype": ("auto", *names)}
    for argument, values in accepted.items():
        key = f"{section}.engine_kwargs.vllm.{argument}"
        value = _select(config, key)
        if value is not None and str(value) not in values:
            yield Conflict(key, value, f"it overrides the plan's {plan.dtype}", "remove it")
    if quantization := _select(config, f"{section}.engine_kwargs.vllm.quantization"):
        key = f"{section}.engine_kwargs.vllm.quantization"
        yield Conflict(key, quantization, f"a quantized sampler is not {plan.dtype}", "remove it")
    executor = _select(config, f"{section}.engine_kwargs.vllm.distributed_executor_backend")
    if executor not in (None, "mp"):
        key = f"{section}.engine_kwargs.vllm.distributed_executor_backend"
        yield Conflict(key, executor, "its workers are not processes we know how to ask", "remove it")


def _model_conflicts(config: Any, plan: Plan) -> Iterator[Conflict]:
    keys = {"actor_rollout_ref.model.path", *(["critic.model.path"] if uses_critic(config) else [])}
    if REWARD in sampler_sections(config):
        keys.add("reward.reward_model.model_path")
    for key in sorted(keys):
        method = _quantization_of(_select(config, key))
        if method is not None:
            reason = f"the model is stored quantized ({method}), and would be served so"
            yield Conflict(key, _select(config, key), reason, f"use its {plan.dtype} or bfloat16 weights")
    policy = "actor_rollout_ref.model.path"
    if plan.scales_loss and (other := probe_settings.conflict_with(plan.probe, policy, _select(config, policy))):
        yield other


def _quantization_of(model: object) -> str | None:
    path = Path(str(model)).expanduser() / "config.json"
    if not path.is_file():
        return None  # on a hub or a remote file system: verl reads it later
    quantized = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    return None if quantized is None else str(quantized.get("quant_method", "unknown method"))


def apply_to(config: Any, plan: Plan) -> list[str]:
    """Write the plan into a composed configuration, so that what is logged is what is computed.

    Returns:
        One line for each key that said something else, `key: before → after`.
    """
    from omegaconf import OmegaConf

    changed = []
    for key, after in _forced_keys(config, plan).items():
        before = _select(config, key)
        if before != after and not _same_dtype(before, after):
            changed.append(f"{key}: {before} → {after}")
        OmegaConf.update(config, key, after, force_add=True)
    return changed


def effective_dtypes(config: Any, plan: Plan) -> dict[str, str]:
    """Map each role to the dtype it computes in on verl 0.9.1, with the plan or (mode `observe`) without it."""
    roles = {}
    for role, engine_config in _engine_sections(config):
        # The FSDP engine reads mixed_precision and nothing else: its `dtype` key is accepted and ignored.
        key = "dtype" if _on_megatron(config, role) else "mixed_precision.param_dtype"
        stock = _select(config, f"{engine_config}.{key}") or "bfloat16"
        roles[role.rpartition(".")[2]] = str(plan.dtype or torch_name(stock))
    for section in sampler_sections(config):
        role = "rollout" if section == ROLLOUT else "reward"
        roles[role] = str(plan.dtype or torch_name(_select(config, f"{section}.dtype")))
    return roles


def sampler_sections(config: Any) -> list[str]:
    """Return the keys of the sampler configurations this run starts servers for."""
    return [ROLLOUT, *([REWARD] if _select(config, "reward.reward_model.enable") else [])]


def uses_critic(config: Any) -> bool:
    enabled = _select(config, "critic.enable")
    return bool(enabled) if enabled is not None else _select(config, "algorithm.adv_estimator") == "gae"


def uses_ref(config: Any) -> bool:
    return bool(_select(config, "algorithm.use_kl_in_reward") or _select(config, f"{ACTOR}.use_kl_loss"))


def replays_rollouts(config: Any) -> bool:
    """Return whether the run reads saved rollouts and may never sample."""
    return bool(_select(config, "skip.rollout_tq.enable") or _select(config, "skip.rollout.enable"))


def bypasses_old_log_probs(config: Any) -> bool:
    """Return whether the run takes the sampler's log-probs for the learner's: nothing to compare then."""
    return bool(_select(config, "algorithm.rollout_correction.bypass_mode"))


def _engine_sections(config: Any) -> list[tuple[str, str]]:
    roles = [ACTOR, *([REF] if uses_ref(config) else []), *([CRITIC] if uses_critic(config) else [])]
    return [(role, _engine_section(config, role)) for role in roles]


def _engine_section(config: Any, role: str) -> str:
    if _on_megatron(config, role):
        return f"{role}.megatron"
    legacy_critic = role == CRITIC and _select(config, _LEGACY_CRITIC_CONFIG) is not None
    return _LEGACY_CRITIC_CONFIG if legacy_critic else _ENGINE_CONFIG[role]


def _on_megatron(config: Any, role: str) -> bool:
    return bool(_select(config, f"{role}.strategy") == MEGATRON)


def _forced_keys(config: Any, plan: Plan) -> dict[str, Any]:
    forced: dict[str, Any] = {}
    for role, engine_config in _engine_sections(config):
        if _select(config, f"{engine_config}.dtype") is not None:  # there is no such key before 0.6.1
            forced[f"{engine_config}.dtype"] = plan.dtype
        if _on_megatron(config, role):
            continue
        forced[f"{engine_config}.mixed_precision"] = mixed_precision(plan)
        key = f"{engine_config}.model_dtype"
        forced[key] = stored_dtype(_select(config, key), trains=role != REF, plan=plan)
        no_sync = f"{engine_config}.use_no_sync_for_gradient_accumulation"
        if _select(config, f"{role}.strategy") == "fsdp" and _select(config, no_sync) is not None:
            forced[no_sync] = False
    for section in sampler_sections(config):
        forced[f"{section}.dtype"] = plan.dtype
    return forced


def _same_dtype(before: object, after: object) -> bool:
    if before is None or isinstance(after, dict):
        return before is None
    return torch_name(before) == after


def _select(config: Any, key: str) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.select(config, key, default=None)
