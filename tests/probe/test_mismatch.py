"""The table of pairs: what is sampled, what is scored, and the noise in both."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fp16_patch.probe import examining, vllm_sampler
from fp16_patch.probe.comparing import Pair, ratio
from fp16_patch.probe.examining import examine
from fp16_patch.probe.learning import score
from fp16_patch.probe.precision import DTYPES, ProductsInFloat32, computing_in, in_dtype
from fp16_patch.probe.request import ProbeRequest
from fp16_patch.probe.result import ProbeResult
from fp16_patch.probe.sampling import Sampling, decode
from fp16_patch.probe.sequences import Sampled
from fp16_patch.probe.vllm_watch import RangeWatchExtension
from integration.cpu.tiny_families import tiny_family


@pytest.fixture(scope="module")
def result(tiny_model: Path) -> ProbeResult:
    return examine(ProbeRequest(tiny_model, sampler="hf", count=8, max_new_tokens=32, device="cpu"))


def test_every_pair_is_there_and_more_bits_are_a_smaller_gap(result: ProbeResult) -> None:
    figures = {name: pair["mean_abs"] for name, pair in result.mismatch.items()}
    assert set(figures) == {f"{learner}/{sampler}" for learner in DTYPES for sampler in DTYPES}
    assert figures["fp32/fp32"] <= 1e-5
    assert figures["fp16/fp16"] <= 1e-3
    assert 4 <= figures["bf16/bf16"] / figures["fp16/fp16"] <= 16
    assert result.noise_floor["fp16"]["mean_abs"] < figures["fp16/fp16"]


def test_intervals_hold_what_they_are_of(result: ProbeResult) -> None:
    for figures in result.mismatch.values():
        low, high = figures["mean_abs_interval"]
        assert low <= figures["mean_abs"] <= high
        assert figures["nonfinite_sampler"] == figures["nonfinite_learner"] == 0
    assert result.gain is not None
    assert result.gain["interval"][0] < result.gain["ratio"] < result.gain["interval"][1]


def test_the_same_seed_gives_the_same_figures(result: ProbeResult, tiny_model: Path) -> None:
    again = examine(ProbeRequest(tiny_model, sampler="hf", count=8, max_new_tokens=32, device="cpu"))
    assert again.mismatch == result.mismatch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(7, 300).to(dtype), torch.randn(300, 5).to(dtype)
    with ProductsInFloat32():
        product = left @ right
    assert product.dtype == dtype
    assert torch.equal(product, (left.double() @ right.double()).to(dtype))


def test_a_copy_in_half_leaves_the_model_and_its_buffers_alone(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cast = in_dtype(model, torch.float16)
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.float16}
    assert {buffer.dtype for buffer in cast.buffers()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert cast.lm_head.weight is cast.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "mixtral", "gpt_neox"])
def test_weights_held_wide_give_the_same_bits(family: str, dtype: torch.dtype) -> None:
    model = tiny_family(family).requires_grad_(False).eval()
    sampling = Sampling(max_new_tokens=6)
    decoded = [
        decode(
            in_dtype(model, dtype, held_wide=held_wide),
            [(5, 6, 7), (8, 9)],
            dtype,
            sampling,
            device="cpu",
            advance=lambda _: None,
        )
        for held_wide in (False, True)
    ]
    assert decoded[0] == decoded[1]


def test_scores_do_not_depend_on_the_batch_in_fp32(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompts = [[5, 6, 7], [8] * 9, [10, 11]]
    sampling = Sampling(temperature=0.7, max_new_tokens=9)
    sequences = decode(model, prompts, torch.float32, sampling, device="cpu", advance=lambda _: None)
    assert [len(sequence.response) for sequence in sequences] == [9, 9, 9]
    for batch_tokens in (1, 10_000):
        settings = {"device": "cpu", "temperature": 0.7, "batch_tokens": batch_tokens, "advance": lambda _: None}
        scores = score(model, sequences, torch.float32, **settings)
        for sequence, values in zip(sequences, scores, strict=True):
            assert values == pytest.approx(sequence.log_probs, abs=1e-5)


def test_a_response_ends_with_what_ends_it(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    every = frozenset(range(50))
    sampling = Sampling(max_new_tokens=30, stop=every)
    sequences = decode(model, [[5]] * 6, torch.float32, sampling, device="cpu", advance=lambda _: None)
    assert all(sequence.response[-1] in every for sequence in sequences)
    assert not any(set(sequence.response[:-1]) & every for sequence in sequences)


def test_a_nan_is_counted_and_not_averaged() -> None:
    sequences = [Sampled((1,), (2, 3), (-1.0, -2.0)), Sampled((1,), (4,), (-4.0,))]
    figures = Pair.of(sequences, [[-1.5, float("nan")], [-4.25]]).figures(seed=0)
    assert figures["nonfinite_learner"] == 1
    assert figures["mean_abs"] == pytest.approx((0.5 + 0.25) / 2)
    assert figures["low_probability"] == {"below": -3.0, "tokens": 1, "mean_abs": 0.25}


def test_a_ratio_of_equal_pairs_is_one() -> None:
    sequences = [Sampled((1,), (2, 3), (-1.0, -2.0 - row)) for row in range(20)]
    pair = Pair.of(sequences, [[-1.1, -2.3 - row] for row in range(20)])
    low, high = ratio(pair, pair, seed=0)["interval"]
    assert low <= 1.0 <= high


@pytest.mark.vllm
def test_vllm_samples_and_shows_the_range_of_its_modules(tiny_model: Path) -> None:
    pytest.importorskip("vllm")
    request = ProbeRequest(tiny_model, sampler="vllm", dtypes=("fp16",), count=4, max_new_tokens=16, device="cpu")
    result = examine(request)
    figures = result.mismatch["fp16/fp16"]
    assert figures["tokens"] > 16
    assert 0 < figures["mean_abs"] <= 2e-3
    generation = {row["module"] for row in result.headroom if row["phase"] == "generation"}
    assert any(module.endswith("qkv_proj") for module in generation)
    assert "vllm" in result.settings["releases"]


def test_products_are_added_up_in_fp32_while_it_probes_and_tf32_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    monkeypatch.setattr(examining, "_examine", lambda *_: matmul.allow_fp16_reduced_precision_reduction)
    asked: Any = SimpleNamespace(device="cpu")
    try:
        matmul.allow_fp16_reduced_precision_reduction = True
        assert examine(asked) is False
        assert matmul.allow_fp16_reduced_precision_reduction
        RangeWatchExtension().hold_sums()
        assert not matmul.allow_fp16_reduced_precision_reduction
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    assert vllm_sampler._environment()["TRITON_F32_DEFAULT"] == "ieee"


def test_half_products_keep_autocast(tiny_model: Path) -> None:
    model = in_dtype(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), torch.float16)
    with computing_in(torch.float16, "cpu"):
        logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.dtype == torch.float16


def test_json_of_a_result_says_how_it_was_made(result: ProbeResult) -> None:
    settings = json.loads(json.dumps(result.as_dict()))["settings"]
    assert settings["sampler"] == "transformers"
    assert settings["seed"] == 0
    assert set(settings["releases"]) == {"fp16_patch", "torch", "transformers"}


def test_the_reason_is_vllms_first_error() -> None:
    from fp16_patch.probe.vllm_sampler import _what_it_says

    log = (
        "(Worker pid=7) ERROR 11-24 [multiproc_executor.py:1] RuntimeError: no attention for head_dim=16\n"
        "(EngineCore pid=6) ERROR 11-24 [core.py:9] RuntimeError: Worker failed\n"
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."
    )
    assert _what_it_says(log) == "RuntimeError: no attention for head_dim=16"
    assert _what_it_says("one\ntwo\n") == "one\ntwo"
    assert _what_it_says("") == "vLLM ended without a message"
