"""SGLang, as a plan sees it: which of its arguments and variables compute in another dtype than they are told."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from fp16_patch.plan.dtypes import BFLOAT16
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import MODE_ENV, Plan
from fp16_patch.samplers.arguments import (
    Judge,
    overridden,
    overridden_downwards,
    overridden_unless_auto,
    quantized,
    spoilt,
)
from fp16_patch.samplers.interface import Interface
from fp16_patch.samplers.sampler import Sampler
from fp16_patch.untrusted.reading import Unreadable, json_of

ORIGINAL_LOG_PROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"
# What SGLang, in one place or another, or people take for a switch that is on.
_ON = ("1", "true", "yes", "y", "on", "t")

# Experts' kernels that allocate or assert bfloat16, whatever the weights are in.
BF16_ONLY_EXPERTS = (
    "deep_gemm",
    "experimental_sgl_trtllm",
    "flashinfer_cutedsl",
    "flashinfer_mxfp4",
    "flashinfer_trtllm",
    "flashinfer_trtllm_routed",
    "megamoe",
    "triton_kernel",
)
# Ways of exchanging experts' tokens that lead to such kernels, or to buffers in bfloat16.
BF16_ONLY_EXCHANGES = ("ascend_fuseep", "deepep", "flashinfer", "megamoe", "mooncake", "mori", "nixl")


def _bf16_only(names: tuple[str, ...], what: str) -> Judge:
    def judge(value: object, plan: Plan) -> str | None:
        spoils = plan.dtype != BFLOAT16.torch and str(value) in names
        return f"{what} in bfloat16 only" if spoils else None

    return judge


def _on_policy(value: object, plan: Plan) -> str | None:
    if not value or plan.dtype == BFLOAT16.torch:
        return None
    return "it casts logits, the head and activations to bfloat16, to be like a learner in bfloat16"


def _model_overrides(value: object, plan: Plan) -> str | None:
    try:
        overrides = value if isinstance(value, Mapping) else json_of(str(value or "{}"))
    except Unreadable:
        overrides = None
    if not isinstance(overrides, Mapping):
        return None  # SGLang says what is wrong with it
    said = {name: overrides[name] for name in ("dtype", "torch_dtype") if overrides.get(name)}
    spoils = next((f"{name}: {reason}" for name, each in said.items() if (reason := overridden(each, plan))), None)
    if spoils is None and overrides.get("quantization_config"):
        return quantized(overrides["quantization_config"], plan)
    return spoils


JUDGES: dict[str, Judge] = {
    "dtype": overridden,
    # It knows no float16, so that only what follows the weights is in it.
    "kv_cache_dtype": overridden_unless_auto,
    "mamba_ssm_dtype": overridden_downwards,
    "quantization": quantized,
    "quantize_and_serve": quantized,
    "rl_quant_profile": quantized,
    "torchao_config": quantized,
    "modelopt_quant": quantized,
    "json_model_override_args": _model_overrides,
    "rl_on_policy_target": _on_policy,
    "moe_runner_backend": _bf16_only(BF16_ONLY_EXPERTS, "its kernels compute the experts"),
    "moe_a2a_backend": _bf16_only(BF16_ONLY_EXCHANGES, "its kernels exchange the experts' tokens"),
}


CONVOLUTIONS = "SGLANG_MAMBA_CONV_DTYPE"
"""Says in which dtype recurrent layers keep what their convolutions see: bfloat16 where it is unset."""
_OF_RECURRENT_LAYERS: dict[str, Judge] = {CONVOLUTIONS: overridden, "SGLANG_MAMBA_SSM_DTYPE": overridden_downwards}


class SGLang(Sampler):
    """SGLang's runtime, from the release on that loads plugins in its schedulers."""

    name: ClassVar = "sglang"
    interface: ClassVar = Interface("sglang")
    plugins: ClassVar = "SGLANG_PLUGINS"
    renormalizes: ClassVar = False
    log_prob_setting: ClassVar = None

    def argument_conflicts(self, key: str, arguments: Mapping[str, Any], plan: Plan) -> Iterator[Conflict]:
        return spoilt(key, arguments, JUDGES, plan)

    def environment_conflicts(self, plan: Plan) -> Iterator[Conflict]:
        for name, judge in _OF_RECURRENT_LAYERS.items():
            if (value := os.environ.get(name)) and (reason := judge(value, plan)):
                yield Conflict(name, value, reason, "unset it")
        value = os.environ.get(ORIGINAL_LOG_PROBS)
        if value is not None and value.strip().lower() in _ON:
            reason = "it makes SGLang report log-probs of temperature 1, whatever it samples at"
            yield Conflict(ORIGINAL_LOG_PROBS, value, reason, f"unset it, or {MODE_ENV}=observe to measure it so")

    def model_conflicts(self, key: str, model: object, plan: Plan) -> Iterator[Conflict]:
        del (
            key,
            model,
            plan,
        )  # it serves every family in float16 that it is told to; some not, which its settled arguments say
        yield from ()


SGLANG = SGLang()
