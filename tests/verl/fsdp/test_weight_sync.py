"""What verl's FSDP engine sends on two ranks, loaded by verl's extension into a real vLLM: the same sampler."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.vllm, pytest.mark.e2e]
pytest.importorskip("verl")
pytest.importorskip("vllm")

from tests.installed_release import sits_in

IN_FP32 = sits_in("fsdp-wire", "FSDPEngine._merged_lora_per_tensor_param")  # stock before 0.9 sends bfloat16


@IN_FP32
def test_half_the_bytes_make_the_same_sampler_to_the_last_bit(tiny_model: Path) -> None:
    from integration.bench.wire import sync_of

    facts = sync_of(tiny_model, seed=0)
    assert facts["bytes_ours"] / facts["bytes_stock"] == 0.5
    assert set(facts["dtypes"].values()) == {"float16"}
    assert facts["bitwise"]


@IN_FP32
def test_a_router_that_vllm_keeps_in_fp32_arrives_in_it(tmp_path: Path) -> None:
    from integration.bench.wire import sync_of
    from integration.cpu.tiny_families import write_family

    facts = sync_of(write_family("glm4_moe", tmp_path), seed=0)
    kept = {name for name, dtype in facts["dtypes"].items() if dtype == "float32"}
    ends = ("gate.weight", "gate.e_score_correction_bias")
    assert kept == {f"model.layers.{layer}.mlp.{end}" for layer in (1, 2) for end in ends}
    assert facts["bytes_ours"] / facts["bytes_stock"] == pytest.approx(0.5, abs=1e-3)
    assert facts["bitwise"]
    # The case that made verl send FP32.
    assert not facts["bitwise_if_all_rounded"]
