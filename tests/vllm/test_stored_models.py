"""Which families of models the installed vLLM refuses in float16, by its own table."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from fp16_patch.patching.sources import Installed
from fp16_patch.vllm import stored_models


class Vllm:
    """A release of vLLM whose sources are these."""

    def __init__(self, **modules: str) -> None:
        self.modules = {name.replace("__", "."): text for name, text in modules.items()}

    def read(self, module: str) -> str | None:
        return self.modules.get(module)


@pytest.mark.vllm
def test_the_families_are_those_that_the_installed_vllm_refuses() -> None:
    vllm_model = pytest.importorskip("vllm.config.model")
    families = set(getattr(vllm_model, stored_models.REFUSED))
    assert families
    assert stored_models.refused_in_float16(Installed()) == families


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


def test_to_ask_vllm_does_not_import_it() -> None:
    program = """
import sys
from fp16_patch.vllm.stored_models import family_refused_in_float16
family_refused_in_float16({"model_type": "gemma2"})
print([name for name in ("torch", "vllm", "transformers") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
