"""Sums inside matrix products: FP32 under a plan, as they were without one, and attested."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fp16_patch import Plan
from fp16_patch.runtime.activation import activate, attestation, deactivate, ledger, refine
from fp16_patch.runtime.gemm_sums import IEEE_ENVIRONMENT
from fp16_patch.runtime.ledger import judge

SWITCHES = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
MATMUL = torch.backends.cuda.matmul


def switches() -> list[bool]:
    return [getattr(MATMUL, name) for name in SWITCHES if hasattr(MATMUL, name)]


@pytest.fixture(autouse=True)
def all_on() -> Iterator[list[bool]]:
    before = switches()
    for name, _ in zip(SWITCHES, before, strict=False):
        setattr(MATMUL, name, True)
    yield [True] * len(before)
    deactivate()
    for name, value in zip(SWITCHES, before, strict=False):
        setattr(MATMUL, name, value)


@pytest.mark.parametrize("mode", ["fp16", "bf16", "fp32"])
def test_a_plan_with_a_dtype_turns_them_off_and_its_end_on_again(mode: str, all_on: list[bool]) -> None:
    activate(Plan(mode=mode))
    assert not any(switches())
    deactivate()
    assert switches() == all_on


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_a_plan_without_a_dtype_leaves_them(mode: str, all_on: list[bool]) -> None:
    activate(Plan(mode=mode))
    assert switches() == all_on


def test_what_was_off_stays_off() -> None:
    MATMUL.allow_bf16_reduced_precision_reduction = False
    activate(Plan())
    deactivate()
    assert not MATMUL.allow_bf16_reduced_precision_reduction
    assert MATMUL.allow_fp16_reduced_precision_reduction


def test_a_plan_that_a_run_refines_to_watching_gives_them_back(all_on: list[bool]) -> None:
    activate(Plan())
    refine({"mode": "observe"}, source="fp16_patch")
    assert switches() == all_on


@pytest.mark.parametrize("first", ["import torch", "fp16_patch.activate()"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    program = f"import fp16_patch; {first}; import torch; fp16_patch.activate(); print(torch.backends.cuda.matmul." + (
        "allow_fp16_reduced_precision_reduction)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


def gemm_sums(mode: str, **seen: str) -> list[str]:
    activate(Plan(mode=mode))
    for quantity, dtype in seen.items():
        ledger().note("rollout" if "kv_cache" in seen else "actor", quantity, dtype)
    (row,) = attestation()["roles"].values()
    return list(row["gemm_sum"])


@pytest.mark.parametrize(("mode", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_under_a_plan_they_are_attested_as_float32(mode: str, dtype: str) -> None:
    assert gemm_sums(mode, activation=dtype) == ["float32"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_without_one_as_what_torch_allows(dtype: str) -> None:
    assert gemm_sums("observe", activation=dtype) == [dtype]


def test_a_sampler_that_has_not_computed_attests_by_its_cache() -> None:
    assert gemm_sums("observe", kv_cache="float16") == ["float16"]


def test_what_a_sampler_keeps_in_float32_is_no_attention_in_tf32() -> None:
    activate(Plan())
    ledger().note("reward", "engine_weight", "float16", "float32")
    ledger().note("reward", "kv_cache", "float16")
    assert attestation()["roles"]["reward"]["gemm_sum"] == ["float32"]
    assert judge([attestation()], Plan(), {}) == []


def test_who_turns_a_switch_back_on_is_found() -> None:
    activate(Plan())
    ledger().note("actor", "activation", torch.float16)
    MATMUL.allow_fp16_reduced_precision_reduction = True
    (finding,) = judge([attestation()], Plan(), {})
    assert (finding.role, finding.quantity, finding.seen, finding.wanted) == ("actor", "gemm_sum", "float16", "float32")


def test_tf32_is_not_float32() -> None:
    activate(Plan(mode="fp32"))
    ledger().note("actor", "activation", torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        (finding,) = judge([attestation()], Plan(mode="fp32"), {})
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (finding.quantity, finding.seen) == ("gemm_sum", "tfloat32")


def test_a_sampler_in_float32_keeps_triton_from_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gemm_sums("fp32", kv_cache="float32", activation="float32") == ["float32"]
    monkeypatch.delenv("TRITON_F32_DEFAULT")
    assert attestation()["roles"]["rollout"]["gemm_sum"] == ["float32", "tfloat32"]


def test_only_the_plan_in_float32_tells_processes_to_stay_out_of_tf32(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> dict[str, Any]:
        return {name: os.environ.get(name) for name in IEEE_ENVIRONMENT}

    from fp16_patch.runtime import propagation

    monkeypatch.setitem(propagation._inherited, "TRITON_F32_DEFAULT", "tf32x3")
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x3")
    theirs = told()
    activate(Plan())
    assert told() == theirs
    deactivate()
    activate(Plan(mode="fp32"))
    assert told() == IEEE_ENVIRONMENT
    assert IEEE_ENVIRONMENT.items() <= propagation.carried_environment().items()
    assert "TRITON_F32_DEFAULT: tf32x3 → ieee" in capsys.readouterr().err
    deactivate()
    assert told() == theirs
