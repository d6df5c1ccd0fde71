"""Brings OpenRLHF's command line under the plan: forces flags, and refuses others with the fix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from fp16_patch.plan import probe_settings
from fp16_patch.plan.dtypes import BFLOAT16, FLOAT32, is_half, spelling_of, torch_name
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.plan.plan import ENVIRONMENT, MODE_ENV, Plan, as_given
from fp16_patch.plan.stored_config import stored_dtype
from fp16_patch.runtime.slow_experts import slow_experts
from fp16_patch.samplers.models import model_conflicts
from fp16_patch.vllm.sampler import VLLM

_GRADIENT_DTYPE = FLOAT32.short
_MODELS = tuple(f"{role}.model_name_or_path" for role in ("actor", "critic", "reward", "model", "ref"))
_DTYPE, _ACCUMULATION = "ds.param_dtype", "ds.grad_accum_dtype"
# What these are called on the command lines up to 0.10.1, which have no sections.
_WITHOUT_SECTIONS = {
    "actor.model_name_or_path": "pretrain",
    "critic.model_name_or_path": "critic_pretrain",
    "reward.model_name_or_path": "reward_pretrain",
    "ref.model_name_or_path": "ref_pretrain",
    "ds.load_in_4bit": "load_in_4bit",
    "ds.tensor_parallel_size": "ds_tensor_parallel_size",
    "ds.zero_stage": "zero_stage",
    "ds.lora.rank": "lora_rank",
    "ds.lora.target_modules": "target_modules",
    "ds.adam_offload": "adam_offload",
    "ds.deepcompile": "deepcompile",
    _DTYPE: "param_dtype",
    _ACCUMULATION: "grad_accum_dtype",
    "algo.kl.init_coef": "init_kl_coef",
    "algo.advantage.estimator": "advantage_estimator",
    "reward.remote_url": "remote_rm_url",
    "ckpt.path": "ckpt_path",
    "train.agent_func_path": "agent_func_path",
    "data.dataset": "dataset",
    "train.async_enable": "async_train",
    "train.dynamic_batch_enable": "use_dynamic_batch",
    "rollout.top_p": "top_p",
    "rollout.batch_size": "rollout_batch_size",
    "rollout.micro_batch_size": "micro_rollout_batch_size",
    "rollout.n_samples_per_prompt": "n_samples_per_prompt",
    "vllm.num_engines": "vllm_num_engines",
}
# Up to 0.9.1, for half precision: whichever the patches make of it.
_HALF = BFLOAT16.short


def check(args: Any, plan: Plan) -> None:
    """Stop before any model is loaded if a setting of the run cannot be had under the plan.

    Args:
        args: OpenRLHF's arguments, in its nested namespaces or, up to 0.10.1, in one.

    Raises:
        PlanError: with every such flag, its value and the fix.
    """
    conflicts = list(conflicts_of(args, plan)) if plan.overrides_dtype else []
    if conflicts:
        raise PlanError(conflicts)


def conflicts_of(args: Any, plan: Plan) -> Iterator[Conflict]:
    """Yield the settings of the command line, and of the plan, that cannot be had together."""
    stage_flag = flag(args, "ds.zero_stage")
    if not is_half(plan.dtype):
        yield Conflict(MODE_ENV, plan.mode, "OpenRLHF trains in bf16 or fp16 only", "use bf16, fp16 or observe")
    if get(args, "ds.load_in_4bit"):
        reason = "OpenRLHF computes 4-bit weights in bfloat16"
        yield Conflict(flag(args, "ds.load_in_4bit"), True, reason, "leave it out")
    if (size := int(get(args, "ds.tensor_parallel_size") or 1)) > 1:
        reason = "OpenRLHF builds DeepSpeed's tensor parallelism in bfloat16"
        yield Conflict(flag(args, "ds.tensor_parallel_size"), size, reason, f"use 1, with a higher {stage_flag}")
    if (stage := int(get(args, "ds.zero_stage") or 2)) not in (2, 3):
        reason = "its optimizers do not accumulate gradients in FP32 beside half-precision weights"
        yield Conflict(stage_flag, stage, reason, "use 2 or 3")
    if int(get(args, "ds.lora.rank") or 0) > 0 and stage == 3 and not is_supervised(args):
        reason = "adapters are merged on the way to the sampler where a rank holds them whole"
        yield Conflict(flag(args, "ds.lora.rank"), get(args, "ds.lora.rank"), reason, f"use {stage_flag} 2")
    if get(args, "ds.deepcompile"):
        reason = "DeepSpeed's compiled passes reduce gradients in the parameters' dtype, not in FP32"
        yield Conflict(flag(args, "ds.deepcompile"), True, reason, "leave it out")
    yield from VLLM.environment_conflicts(plan)
    for key in _MODELS:
        yield from _model_conflicts(args, key, plan)
    if plan.scales_loss:
        policy = flag(args, _MODELS[0])
        if other := probe_settings.conflict_with(plan.probe, policy, get(args, _MODELS[0])):
            yield other
        yield from _scaler_conflicts(plan)
        yield from _scaled_gradient_conflicts(args, stage)


def slow_paths_of(args: Any, plan: Plan) -> list[str]:
    """Say what of a command line will be slow under the plan."""
    return list(slow_experts([(flag(args, key), get(args, key)) for key in _MODELS], plan))


def _scaled_gradient_conflicts(args: Any, stage: int) -> Iterator[Conflict]:
    """Yield settings under which DeepSpeed does to scaled FP16 gradients what only unscaled or FP32 ones bear."""
    for key in ("actor.optim", "critic.optim", "optim"):
        if get(args, key) == "muon":
            reason = "DeepSpeed orthogonalizes scaled gradients and divides the result by the scale"
            yield Conflict(f"--{key}", "muon", reason, f"use adam, or {MODE_ENV}=bf16")
    if get(args, "ds.adam_offload") and stage != 3:
        reason = "ZeRO 2 adds up offloaded gradients in float16, still scaled"
        fix = f"use {flag(args, 'ds.zero_stage')} 3, or leave it out"
        yield Conflict(flag(args, "ds.adam_offload"), True, reason, fix)


def _model_conflicts(args: Any, key: str, plan: Plan) -> Iterator[Conflict]:
    sampled = key.startswith("actor.") and bool(_has_sections(args) or get(args, "vllm.num_engines"))
    return model_conflicts(flag(args, key), get(args, key), plan, sampler=VLLM if sampled else None)


def _scaler_conflicts(plan: Plan) -> Iterator[Conflict]:
    """Yield settings of the plan that DeepSpeed's scaler does not have."""
    if not math.log2(plan.init_scale).is_integer():
        yield _setting_conflict("init_scale", plan, "DeepSpeed starts at a power of two", "use 65536")
    if plan.min_scale != int(plan.min_scale):
        yield _setting_conflict("min_scale", plan, "DeepSpeed's floor is a whole number", "use 1")
    for name, only in (("growth_factor", 2.0), ("backoff_factor", 0.5)):
        if getattr(plan, name) != only:
            yield _setting_conflict(name, plan, "DeepSpeed's scaler doubles and halves", f"use {only:g}")


def _setting_conflict(name: str, plan: Plan, reason: str, fix: str) -> Conflict:
    # OpenRLHF's command line has no place for our settings, so that they come from the environment.
    return Conflict(as_given(name, ENVIRONMENT), getattr(plan, name), reason, fix)


def apply_to(args: Any, plan: Plan) -> list[str]:
    """Write the plan into the arguments that OpenRLHF's models and DeepSpeed's configuration are built from.

    Returns:
        One line for each flag that said something else, `--flag: before → after`.
    """
    dtype, changed = spelling_of(plan.dtype).short, []
    if hasattr(args, _HALF):
        if not args.bf16 or dtype != _HALF:
            changed.append(f"--{_HALF}: {args.bf16} → {dtype}")
        args.bf16 = True
        forced = {_ACCUMULATION: _GRADIENT_DTYPE}
    else:
        forced = {_DTYPE: dtype, _ACCUMULATION: _GRADIENT_DTYPE}
    for key, after in forced.items():
        before = get(args, key)
        if before != after:
            changed.append(f"{flag(args, key)}: {before} → {after}")
        *sections, name = str(spelled(args, key)).split(".")
        setattr(_at(args, sections), name, after)
    return changed


def effective_dtypes(args: Any, plan: Plan) -> dict[str, str]:
    """Map each role to the dtype it computes in, with the plan or (mode `observe`) without it."""
    if is_supervised(args):
        return {role: str(plan.dtype or _stock_dtype(args, role)) for role in _supervised_roles(args)}
    roles = ["actor", *(["ref"] if float(get(args, "algo.kl.init_coef") or 0.01) > 0 else [])]
    if (get(args, "algo.advantage.estimator") or "gae") == "gae":
        roles.append("critic")
    if not get(args, "reward.remote_url") and not get(args, "train.agent_func_path"):
        roles.append("reward")
    learners = {role: str(plan.dtype or _stock_dtype(args, role)) for role in roles}
    return {**learners, "rollout": str(plan.dtype or BFLOAT16.torch)}


def _stock_dtype(args: Any, role: str) -> str:
    """Return what OpenRLHF alone loads and trains a role in."""
    if not hasattr(args, _HALF):
        return torch_name(get(args, _DTYPE) or BFLOAT16.torch)
    if args.bf16:
        return BFLOAT16.torch
    # Without the switch, models are loaded with torch_dtype="auto".
    model = get(args, f"{role}.model_name_or_path") or get(args, _MODELS[0])
    return stored_dtype(model) or "as stored"


def is_supervised(args: Any) -> bool:
    """Return whether the command trains on a data set, without a sampler: SFT, DPO, a reward model."""
    *sections, name = str(spelled(args, "data.dataset")).split(".")
    return hasattr(_at(args, sections), name)


def _supervised_roles(args: Any) -> list[str]:
    # DPO alone compares with a reference: a release without sections names it by the flag that moves it off the GPU.
    compares = hasattr(_at(args, ["ref"]), "offload") or hasattr(args, "ref_offload")
    return ["model", *(["ref"] if compares else [])]


def spelled(args: Any, key: str) -> str | None:
    """Spell a flag of the newest OpenRLHF as this command line does; None if it has no such flag."""
    return key if _has_sections(args) else _WITHOUT_SECTIONS.get(key)


def flag(args: Any, key: str) -> str:
    """Spell a flag as it is typed on this command line."""
    return f"--{spelled(args, key) or key}"


def get(args: Any, key: str) -> Any:
    """Return the value of a flag of the newest OpenRLHF; None where this command line has no such flag."""
    name = spelled(args, key)
    return None if name is None else _at(args, name.split("."))


def _has_sections(args: Any) -> bool:
    return hasattr(args, "ds")


def _at(args: Any, path: Sequence[str]) -> Any:
    value = args
    for part in path:
        value = getattr(value, part, None)
    return value
