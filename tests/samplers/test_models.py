"""Which stored models cannot run under a plan: those stored quantized, and those that their sampler does not serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp16_patch import Plan
from fp16_patch.samplers.models import model_conflicts
from fp16_patch.samplers.sampler import Sampler
from fp16_patch.sglang.sampler import SGLANG
from fp16_patch.vllm import stored_models
from fp16_patch.vllm.sampler import VLLM

GPTQ = {"quantization_config": {"quant_method": "gptq"}}
Say = Callable[..., list[str]]


@pytest.fixture
def says(tmp_path: Path) -> Say:
    """What is said of a model that is stored with this configuration."""

    def said(stored: dict[str, Any], sampler: Sampler | None = VLLM, **plan: Any) -> list[str]:
        (tmp_path / "config.json").write_text(json.dumps(stored))
        found = model_conflicts("model.path", str(tmp_path), Plan(**plan), sampler=sampler)
        return [str(conflict).removeprefix(f"model.path={tmp_path}: ") for conflict in found]

    return said


@pytest.mark.parametrize(
    ("stored", "method"),
    [
        (GPTQ, "gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": GPTQ}, "gptq"),
        ({"thinker_config": {"text_config": {"compression_config": {"quant_method": "fp8"}}}}, "fp8"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"quantization_config": {"bits": 4}}, "unknown method"),
    ],
)
@pytest.mark.parametrize(("sampler", "would"), [(VLLM, "served"), (SGLANG, "served"), (None, "trained")])
def test_a_model_stored_quantized_is_refused_wherever_it_says_so(
    stored: dict[str, Any], method: str, sampler: Sampler | None, would: str, says: Say
) -> None:
    (said,) = says({"model_type": "qwen2", **stored}, sampler=sampler)
    assert said.startswith(f"the model is stored quantized ({method}), and would be {would} so. Fix: use its float16")


def test_quantization_beside_the_configuration_is_found(says: Say, tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert "stored quantized (FP8)" in says({"model_type": "llama"})[0]


@pytest.mark.parametrize(
    "stored",
    [{}, {"quantization_config": None}, {"compression_config": {}}, {"text_config": {"quantization_config": None}}],
)
def test_a_model_that_is_not_quantized_is_not_refused(stored: dict[str, Any], says: Say) -> None:
    assert says({"model_type": "qwen3_5", **stored}) == []


def test_what_vllm_refuses_in_float16_is_refused_where_vllm_serves_it(
    says: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_models, "refused_in_float16", lambda sources: frozenset({"hot"}))
    (said,) = says({"model_type": "hot"})
    assert said.startswith("vLLM refuses models of type hot in float16")
    assert "FP16_PATCH=bf16" in said
    assert says({"model_type": "hot"}, mode="bf16") == []
    assert says({"model_type": "hot"}, sampler=SGLANG) == []
    assert says({"model_type": "hot"}, sampler=None) == []


def test_a_model_of_the_hub_is_judged_where_it_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert list(model_conflicts("model.path", "someone/model", Plan(), sampler=VLLM)) == []
    model = tmp_path / "models--someone--model"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(GPTQ))
    (said,) = model_conflicts("model.path", "someone/model", Plan(), sampler=VLLM)
    assert str(said).startswith("model.path=someone/model: the model is stored quantized (gptq)")
