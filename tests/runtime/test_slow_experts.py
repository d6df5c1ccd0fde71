"""Models whose experts are slow in the plan's dtype are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fp16_patch import Plan
from fp16_patch.runtime.slow_experts import slow_experts


class Transformers:
    """A release in which one family's experts are computed by grouped_mm."""

    def read(self, module: str) -> str | None:
        known = {"mixtral": "@use_experts_implementation\nclass MixtralExperts: ...", "llama": "class LlamaMLP: ..."}
        _, _, kind = module.rpartition("modeling_")
        return known.get(kind)


def said(folder: Path, config: dict[str, Any], mode: str = "fp16") -> list[str]:
    (folder / "config.json").write_text(json.dumps(config))
    return list(slow_experts([("model.path", folder)], Plan(mode=mode), Transformers()))


NESTED = {"model_type": "vl", "text_config": {"model_type": "mixtral"}}


@pytest.mark.parametrize("config", [{"model_type": "mixtral"}, NESTED], ids=["plain", "nested"])
@pytest.mark.parametrize("mode", ["fp16", "fp32"])
def test_a_model_with_such_experts_is_named(config: dict[str, Any], mode: str, tmp_path: Path) -> None:
    (sentence,) = said(tmp_path, config, mode)
    assert sentence.startswith("model.path: the learner computes the experts of mixtral one after another in float")


@pytest.mark.parametrize("mode", ["bf16", "observe"])
def test_not_where_it_is_one_kernel_or_no_plan_decides(mode: str, tmp_path: Path) -> None:
    assert said(tmp_path, {"model_type": "mixtral"}, mode) == []


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "unknown"}, {}])
def test_a_model_without_is_not(config: dict[str, Any], tmp_path: Path) -> None:
    assert said(tmp_path, config) == []


def test_a_model_on_a_hub_is_passed_over() -> None:
    assert list(slow_experts([("model.path", "org/model"), ("critic", None)], Plan(), Transformers())) == []


def test_the_installed_transformers_marks_such_experts(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    assert len(list(slow_experts([("model.path", tmp_path)], Plan()))) == 1
