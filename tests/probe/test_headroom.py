"""Models that leave FP16's range in one known place are found out, the families people train are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fp16_patch.plan.errors import PlanError
from fp16_patch.probe.families import known_risk
from fp16_patch.probe.loading import refusing_to_overflow
from fp16_patch.probe.result import ProbeResult
from integration.cpu.tiny_families import FAMILIES, UNSAFE

Probe = Callable[..., ProbeResult]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_false_alarm_on_a_family(probed: Probe, family: str) -> None:
    result = probed(family)
    risk = known_risk(family)
    assert result.overflows == []
    assert result.recommendation.precision == ("bf16" if risk and risk.refused else "fp16")
    assert 1024 <= result.recommendation.init_scale <= 65536


@pytest.mark.parametrize("name", UNSAFE)
def test_an_overflow_is_found_where_it_comes_up(probed: Probe, name: str) -> None:
    result, unsafe = probed(name), UNSAFE[name]
    phases = ("backward",) if unsafe.phase == "backward" else ("forward", "generation")
    assert {found["phase"] for found in result.overflows} <= {*phases, "backward"}
    first = result.overflows[0]
    assert (first["phase"] in phases, first["module"]) == (True, unsafe.module)
    assert result.recommendation.precision != "fp16"
    assert unsafe.module in result.recommendation.reasons[0]


@pytest.mark.parametrize("name", [name for name, unsafe in UNSAFE.items() if unsafe.phase == "forward"])
def test_what_is_predicted_happens_in_float16(written: Callable[[str], Path], name: str) -> None:
    """The constructed models are what they are said to be: in float16 their log-probs are not finite."""
    model = AutoModelForCausalLM.from_pretrained(written(name), dtype=torch.float16, attn_implementation="eager")
    if name == "router":
        # Its overflow is softened: the largest is infinite, and the softmax NaN.
        model.config._experts_implementation = "eager"
    logits = model(torch.arange(5, 40)[None]).logits
    assert not logits.isfinite().all()


@pytest.mark.parametrize("name", ["embedding", "residual"])
def test_no_module_in_fp32_helps_the_residual_stream(probed: Probe, name: str) -> None:
    recommendation = probed(name).recommendation
    assert recommendation.precision == "bf16"
    assert any("residual stream" in reason for reason in recommendation.reasons)


@pytest.mark.parametrize("name", ["mlp", "attention_scores", "router"])
def test_one_module_in_fp32_would_do(probed: Probe, name: str) -> None:
    recommendation = probed(name).recommendation
    assert recommendation.precision == "fp16_with_fp32_modules"
    assert recommendation.fp32_modules == (UNSAFE[name].module,)


def test_a_first_scale_has_room_for_larger_gradients_than_were_seen(probed: Probe) -> None:
    gradients = probed("qwen2").gradients
    assert gradients is not None
    assert 8 <= gradients["largest_scale"] / gradients["init_scale"] < 16


def test_a_known_risk_is_named_though_the_prompts_look_fine(probed: Probe) -> None:
    (warning,) = probed("qwen3_moe").recommendation.warnings
    assert "qwen3_moe" in warning
    assert "unsloth-zoo#866" in warning


def test_the_result_is_json_throughout(probed: Probe, tmp_path: Path) -> None:
    result = probed("residual")
    result.write(tmp_path / "probe.json")
    read = json.loads((tmp_path / "probe.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read["recommendation"]["precision"] == "bf16"
    assert read["cost"]["memory_bytes"] > 0


def test_a_device_that_is_full_is_an_error_with_a_fix() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nsecond line")
    said = r"^--device=cuda: its memory is full \(CUDA out of memory\. Tried to allocate 2 GiB\)\. Fix: use --device"
    with pytest.raises(PlanError, match=said), refusing_to_overflow("cuda"):
        raise full
