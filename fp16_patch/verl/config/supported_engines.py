"""Tells which engines compute under the plan, and which of their settings cannot be had there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.plan.dtypes import BFLOAT16, is_half
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import Plan
from fp16_patch.verl.config.selection import Select

FSDP = ("fsdp", "fsdp2")
VEOMNI = "veomni"
MEGATRON = "megatron"
ENGINES = (*FSDP, MEGATRON)

_UNSCALED = "never scales the loss, so small gradients would vanish"
VEOMNI_ENGINE = "verl.workers.engine.veomni.transformer_impl"
# Without it verl can tell VeOmni of no dtype.
_VEOMNI_DTYPES = "MixedPrecisionConfig"
_REFUSED = {
    "torchtitan": f"verl's torchtitan engine computes in bfloat16, whatever its keys say, and {_UNSCALED}",
    VEOMNI: "VeOmni, as of this release, shards for bfloat16 in parallelize_model_fsdp2 and takes no other dtype, and "
    f"its engine {_UNSCALED}",
    "automodel": f"verl's automodel engine computes in bfloat16 under autocast, and {_UNSCALED}",
    "fsdp_turbo": "FSDPTurboEngineWithLMHead._build_fsdp_module shards by turbo_config and leaves the engine's "
    f"autocast at bfloat16 and its scaler at None: it {_UNSCALED}; and the library behind it has no release to test",
    "mindspeed": "it patches Megatron for Ascend, in places that nobody has checked",
    "mindspeed_megatron": "it patches Megatron for Ascend, in places that nobody has checked",
}


def engine_conflict(role: str, strategy: object) -> Conflict | None:
    """Say why this engine is refused; None if it is not."""
    if strategy in ENGINES or (strategy == VEOMNI and _veomni_takes_dtypes(Installed())):
        return None
    reason = _REFUSED.get(str(strategy), "fp16_patch cannot vouch for this engine")
    fix = f"use {', '.join(ENGINES[:-1])} or {ENGINES[-1]}, or FP16_PATCH=observe to measure without changing"
    return Conflict(f"{role}.strategy", strategy, reason, fix)


def conflicts_of_role(select: Select, role: str, section: str, plan: Plan, *, trains: bool) -> Iterator[Conflict]:
    """Yield why a role's engine cannot be had under the plan: the engine itself, else its settings.

    Args:
        select: the value of a key in the run's configuration; None where there is none.
        role: its key, as `actor_rollout_ref.actor`.
        section: key of its engine's settings, as `actor_rollout_ref.actor.fsdp_config`.
        trains: whether an optimizer updates it.
    """
    strategy = select(f"{role}.strategy")
    conflict = engine_conflict(role, strategy)
    if conflict is not None:
        yield conflict
    elif strategy == MEGATRON:
        yield from megatron_conflicts(select, role, plan, trains=trains)
    elif strategy == VEOMNI:
        yield from veomni_conflicts(select, role, plan, trains=trains)
    for qat in (f"{section}.qat.enable", f"{role}.qat.enable"):
        if select(qat):
            yield Conflict(qat, True, "quantization-aware training computes in the quantized dtype", "set it to false")


def _veomni_takes_dtypes(sources: Sources) -> bool:
    return _VEOMNI_DTYPES in (sources.read(VEOMNI_ENGINE) or "")


def veomni_conflicts(select: Select, role: str, plan: Plan, *, trains: bool) -> Iterator[Conflict]:
    """Yield the settings of a role on VeOmni that cannot be had under the plan.

    Args:
        select: the value of a key in the run's configuration; None where there is none.
        role: the key of the role, as `critic`; its VeOmni settings are at `<role>.veomni`.
        trains: whether an optimizer updates it.
    """
    key = f"{role}.{VEOMNI}.attn_implementation"
    if not is_half(plan.dtype) and "flash" in str(select(key)):
        reason = "flash attention takes float16 and bfloat16 only"
        yield Conflict(key, select(key), reason, "use sdpa, with actor_rollout_ref.model.use_remove_padding=False")
    for key, kept, reason, fix in _VEOMNI_SETTINGS if plan.dtype == BFLOAT16.torch else _VEOMNI_OF_ANY_DTYPE:
        yield from _unless_kept(select, f"{role}.{VEOMNI}.{key}", kept, reason, fix)
    if trains:
        yield from _unless_kept(select, f"{role}.optim.optimizer", *_VEOMNI_OPTIMIZER)


def megatron_conflicts(select: Select, role: str, plan: Plan, *, trains: bool) -> Iterator[Conflict]:
    """Yield the settings of a role on Megatron that cannot be had under the plan.

    Args:
        select: the value of a key in the run's configuration; None where there is none.
        role: the key of the role, as `actor_rollout_ref.actor`; its Megatron settings are at `<role>.megatron`.
        trains: whether an optimizer updates it.
    """
    if plan.dtype == "float32":
        yield Conflict(
            f"{role}.strategy", MEGATRON, "verl builds Megatron's models in 16 bits only", "use fsdp or fsdp2"
        )
    for key, kept, reason, fix in _MODEL_SETTINGS if plan.dtype == BFLOAT16.torch else (*_MODEL_SETTINGS, *_DEEPEP):
        yield from _unless_kept(select, f"{role}.megatron.{key}", kept, reason, fix)
    if trains:
        for key, kept, reason, fix in _TRAINING_SETTINGS if plan.scales_loss else _TRAINING_SETTINGS[:1]:
            yield from _unless_kept(select, f"{role}.{key}", kept, reason, fix)


def _unless_kept(select: Select, key: str, kept: tuple[Any, ...], reason: str, fix: str) -> Iterator[Conflict]:
    value = select(key)
    if value not in kept:
        yield Conflict(key, value, reason, fix)


# Key below the role, the values it may have (None: it is not there), why no other, and what to do.
_Setting = tuple[str, tuple[Any, ...], str, str]
_VEOMNI_SETTINGS: tuple[_Setting, ...] = (
    (
        "qat_implementation",
        (None, "none"),
        "quantization-aware training computes in the quantized dtype",
        "set it to none",
    ),
)
_VEOMNI_KERNELS = ("dsa_indexer_implementation", "dsa_attention_implementation", "mhc_implementation")
_VEOMNI_OF_ANY_DTYPE: tuple[_Setting, ...] = (
    *_VEOMNI_SETTINGS,
    *((key, (None, "eager"), "its kernels take bfloat16 only", "use eager") for key in _VEOMNI_KERNELS),
)
_VEOMNI_OPTIMIZER = ((None, "adamw", "muon"), "it keeps its moments in bfloat16", "use adamw")
_MODEL_SETTINGS: tuple[_Setting, ...] = (
    ("use_mbridge", (None, True), "without a bridge Megatron's models are built for bfloat16 only", "set it to true"),
    ("use_megatron_fsdp", (None, False), "fp16_patch cannot vouch for Megatron's own FSDP", "set it to false"),
    ("qat.enable", (None, False), "quantization-aware training computes in the quantized dtype", "set it to false"),
    ("override_transformer_config.fp8", (None, False), "it computes in 8 bits", "remove it"),
    ("override_transformer_config.fp4", (None, False), "it computes in 4 bits", "remove it"),
    (
        "override_transformer_config.first_last_layers_bf16",
        (None, False),
        "it computes the first and last layers in bfloat16",
        "remove it",
    ),
)
# Megatron's flex dispatcher hands tokens to DeepEP or HybridEP.
_DEEPEP: tuple[_Setting, ...] = tuple(
    (f"override_transformer_config.{key}", kept, "DeepEP's kernels add up the experts' tokens in bfloat16 only", fix)
    for key, kept, fix in (
        ("moe_enable_deepep", (None, False), "set it to false"),
        ("moe_token_dispatcher_type", (None, "alltoall", "allgather"), "use alltoall"),
    )
)
_HOOKED = "Megatron makes no CUDA graphs of modules with hooks, by which the plan measures gradients"
_TRAINING_SETTINGS: tuple[_Setting, ...] = (
    (
        "megatron.override_ddp_config.grad_reduce_in_fp32",
        (None, True),
        "gradients add up and are reduced in FP32 under the plan",
        "remove it",
    ),
    (
        "optim.optimizer",
        (None, "adam"),
        "verl makes Megatron's FP16 optimizer a precision-aware one, which exists for adam only",
        "use adam",
    ),
    (
        "megatron.use_distributed_optimizer",
        (None, True),
        "Megatron's precision-aware optimizer, which FP16 has in verl, is a distributed one",
        "set it to true",
    ),
    *(
        (f"megatron.override_transformer_config.{key}", (None, False, "none"), _HOOKED, "remove it")
        for key in ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph")
    ),
    (
        "optim.override_optimizer_config.loss_scale",
        (None,),
        "a fixed loss scale does not answer an overflow",
        "remove it; fp16_patch.init_scale is where the scale starts",
    ),
)
