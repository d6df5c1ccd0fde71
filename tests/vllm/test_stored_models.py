"""Which stored models cannot run under a plan: by what the installed vLLM says of their family, or quantized."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp16_patch import Plan
from fp16_patch.patching.sources import Installed
from fp16_patch.vllm import stored_models

GPTQ = {"quantization_config": {"quant_method": "gptq"}}
Say = Callable[..., list[str]]


class Vllm:
    """A release of vLLM whose sources are these."""

    def __init__(self, **modules: str) -> None:
        self.modules = {name.replace("__", "."): text for name, text in modules.items()}

    def read(self, module: str) -> str | None:
        return self.modules.get(module)


@pytest.fixture
def says(tmp_path: Path) -> Say:
    """What is said of a model that is stored with this configuration."""

    def said(stored: dict[str, Any], sampled: bool = True, **plan: Any) -> list[str]:
        (tmp_path / "config.json").write_text(json.dumps(stored))
        found = stored_models.model_conflicts("model.path", str(tmp_path), Plan(**plan), sampled=sampled)
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
@pytest.mark.parametrize(("sampled", "would"), [(True, "served"), (False, "trained")])
def test_a_model_stored_quantized_is_refused_wherever_it_says_so(
    stored: dict[str, Any], method: str, sampled: bool, would: str, says: Say
) -> None:
    (said,) = says({"model_type": "qwen2", **stored}, sampled=sampled)
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


@pytest.mark.vllm
def test_the_families_are_those_that_the_installed_vllm_refuses(says: Say) -> None:
    vllm_model = pytest.importorskip("vllm.config.model")
    families = set(getattr(vllm_model, stored_models.REFUSED))
    assert families
    assert stored_models.refused_in_float16(Installed()) == families
    for family in families:
        (said,) = says({"model_type": family})
        assert said.startswith(f"vLLM refuses models of type {family} in float16")
        assert "FP16_PATCH=bf16" in said
        assert says({"model_type": family}, mode="bf16") == []
        assert says({"model_type": family}, sampled=False) == []


@pytest.mark.parametrize(
    "source",
    [
        '_FLOAT16_NOT_SUPPORTED_MODELS = {\n    "hot": "too hot",\n}',
        '_FLOAT16_NOT_SUPPORTED_MODELS: dict[str, str] = {"hot": WHY}',
        '_FLOAT16_NOT_SUPPORTED_MODELS = ["hot"]',
    ],
)
@pytest.mark.parametrize(
    "stored", [{"model_type": "hot"}, {"model_type": "seeing", "text_config": {"model_type": "hot"}}]
)
def test_a_family_is_refused_for_the_releases_own_table_and_nested_too(source: str, stored: dict[str, Any]) -> None:
    assert stored_models.family_refused_in_float16(stored, Vllm(vllm__config__model=source)) == "hot"
    assert stored_models.family_refused_in_float16(stored, Vllm(vllm__config=source)) == "hot"


def test_without_vllm_or_its_table_no_family_is_refused() -> None:
    for sources in (Vllm(), Vllm(vllm__config__model="import torch")):
        assert stored_models.family_refused_in_float16({"model_type": "gemma2"}, sources) is None


def test_a_model_of_the_hub_is_judged_where_it_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert list(stored_models.model_conflicts("model.path", "someone/model", Plan(), sampled=True)) == []
    model = tmp_path / "models--someone--model"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(GPTQ))
    (said,) = stored_models.model_conflicts("model.path", "someone/model", Plan(), sampled=True)
    assert str(said).startswith("model.path=someone/model: the model is stored quantized (gptq)")


def test_to_ask_vllm_does_not_import_it() -> None:
    program = """
import sys
from fp16_patch.vllm.stored_models import family_refused_in_float16
family_refused_in_float16({"model_type": "gemma2"})
print([name for name in ("torch", "vllm", "transformers") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
