"""What SGLang is told past the framework's own settings: where it spoils the plan, and where it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fp16_patch import Plan
from fp16_patch.patching.sources import Installed
from fp16_patch.sglang.sampler import BF16_ONLY_EXCHANGES, BF16_ONLY_EXPERTS, CONVOLUTIONS, ORIGINAL_LOG_PROBS, SGLANG

KEY = "rollout.engine_kwargs.sglang"


def said(argument: str, value: Any, mode: str = "fp16") -> list[str]:
    return [str(conflict) for conflict in SGLANG.argument_conflicts(KEY, {argument: value}, Plan(mode=mode))]


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("dtype", "bfloat16", "it overrides the plan's float16"),
        ("dtype", "auto", "it overrides the plan's float16"),
        ("kv_cache_dtype", "fp8_e5m2", "it overrides the plan's float16"),
        ("kv-cache-dtype", "bf16", "it overrides the plan's float16"),
        ("mamba_ssm_dtype", "bfloat16", "it overrides the plan's float16"),
        ("rl_quant_profile", "profile.json", "a quantized sampler is not float16"),
        ("quantize_and_serve", True, "a quantized sampler is not float16"),
        ("quantization", "fp8", "a quantized sampler is not float16"),
        ("torchao_config", "int8wo", "a quantized sampler is not float16"),
        ("rl_on_policy_target", "fsdp", "it casts logits, the head and activations to bfloat16"),
        ("json_model_override_args", '{"torch_dtype": "bfloat16"}', "torch_dtype: it overrides the plan's float16"),
        ("json_model_override_args", {"dtype": "bfloat16"}, "dtype: it overrides the plan's float16"),
        (
            "json_model_override_args",
            json.dumps({"quantization_config": {"quant_method": "fp8"}}),
            "a quantized sampler is not float16",
        ),
    ],
)
def test_what_spoils_the_plan_is_refused_as_it_was_spelled(argument: str, value: Any, reason: str) -> None:
    (conflict,) = said(argument, value)
    assert conflict.startswith(f"{KEY}.{argument}=")
    assert reason in conflict
    assert conflict.endswith("Fix: remove it")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dtype", "float16"),
        ("dtype", "half"),
        ("dtype", None),
        ("kv_cache_dtype", "auto"),
        ("mamba_ssm_dtype", None),
        ("mamba_ssm_dtype", "float32"),
        ("quantize_and_serve", False),
        ("quantization", None),
        ("torchao_config", ""),
        ("rl_on_policy_target", None),
        ("moe_runner_backend", "triton"),
        ("moe_a2a_backend", "none"),
        ("json_model_override_args", "{}"),
        ("json_model_override_args", "no JSON at all"),
        ("json_model_override_args", "[1]"),
        ("attention_backend", "fa3"),
    ],
)
def test_what_does_not_is_not(argument: str, value: Any) -> None:
    assert said(argument, value) == []


@pytest.mark.parametrize(
    ("argument", "backend"),
    [
        *(("moe_runner_backend", backend) for backend in BF16_ONLY_EXPERTS),
        *(("moe_a2a_backend", backend) for backend in BF16_ONLY_EXCHANGES),
    ],
)
def test_experts_in_bfloat16_only_are_refused_but_in_bfloat16(argument: str, backend: str) -> None:
    (conflict,) = said(argument, backend)
    assert "in bfloat16 only" in conflict
    assert said(argument, backend, mode="bf16") == []
    assert len(said(argument, backend, mode="fp32")) == 1


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)])
def test_log_probs_without_the_temperature_are_refused(
    value: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ORIGINAL_LOG_PROBS, raising=False)
    if value is not None:
        monkeypatch.setenv(ORIGINAL_LOG_PROBS, value)
    found = [str(conflict) for conflict in SGLANG.environment_conflicts(Plan())]
    assert len(found) == refused
    assert all(conflict.startswith(f"{ORIGINAL_LOG_PROBS}={value}: ") for conflict in found)


@pytest.mark.parametrize(
    ("variable", "value", "refused"),
    [
        (CONVOLUTIONS, "bfloat16", True),
        (CONVOLUTIONS, "float16", False),
        ("SGLANG_MAMBA_SSM_DTYPE", "bfloat16", True),
        ("SGLANG_MAMBA_SSM_DTYPE", "float32", False),
    ],
)
def test_states_of_recurrent_layers_in_another_dtype_are_refused(
    variable: str, value: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    found = [str(conflict) for conflict in SGLANG.environment_conflicts(Plan())]
    assert len(found) == refused
    assert all(conflict.startswith(f"{variable}={value}: it overrides the plan's float16") for conflict in found)


@pytest.mark.sglang
def test_the_installed_sglang_knows_the_names() -> None:
    known = Installed().read("sglang.srt.server_args")
    if known is None:
        pytest.skip("SGLang is not installed here")
    # Later releases have one more way of computing experts.
    assert {backend for backend in BF16_ONLY_EXPERTS if f'"{backend}"' not in known} <= {"experimental_sgl_trtllm"}
    assert {backend for backend in BF16_ONLY_EXCHANGES if f'"{backend}"' not in known} == set()
    assert CONVOLUTIONS in str(Installed().read("sglang.srt.configs.mamba_utils"))
    # Later releases have no `torchao_config`.
    assert all(f"{argument}:" in known for argument in ("rl_on_policy_target", "kv_cache_dtype", "quantization"))
