"""Fused kernels are judged by their code: what divides and returns in float32 is let through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fp16_patch import Plan
from fp16_patch.patching.sources import Installed
from fp16_patch.verl.config import fused_kernels
from fp16_patch.verl.config.fused_kernels import BACKEND, SWITCH, rounded_by_torch, scales_in_fp32

KERNELS = """
def efficient_entropy_kernel_general_mainloop(rcp_temperature):
    logits = tl.zeros((M, N), dtype=tl.float32)
    logits = tl.dot(hidden, weight, logits)
    logits *= rcp_temperature

def efficient_entropy_forward(hidden, temperature):
    if REDUCTION:
        logprobs = torch.zeros((tokens,), device=hidden.device, dtype=torch.float32)
    else:
        logprobs = torch.empty((), device=hidden.device, dtype=torch.float32)
    entropy = torch.empty((tokens,), device=hidden.device, dtype=torch.float32)
    return logprobs, entropy
"""


class Verl:
    """A release of verl whose kernels are these."""

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels

    def read(self, module: str) -> str | None:
        return self.kernels


def settings(**options: Any) -> Callable[[str], Any]:
    return {SWITCH: True, BACKEND: options.get("backend")}.get


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("logits *= rcp_temperature", "pass"),
        ("dtype=tl.float32", "dtype=tl.float16"),
        ("(), device=hidden.device, dtype=torch.float32", "(), device=hidden.device, dtype=hidden.dtype"),
        ("entropy = torch.empty((tokens,), device=hidden.device, dtype=torch.float32)", "entropy = logprobs.half()"),
        ("def efficient_entropy_forward", "def of_another_name"),
    ],
)
def test_kernels_that_round_are_told_from_those_that_do_not(before: str, after: str) -> None:
    assert scales_in_fp32(Verl(KERNELS))
    assert before in KERNELS
    assert not scales_in_fp32(Verl(KERNELS.replace(before, after)))


@pytest.mark.verl
def test_the_installed_releases_triton_kernels_divide_and_return_in_float32() -> None:
    assert scales_in_fp32(Installed())


@pytest.mark.verl
def test_fsdps_torch_kernels_round_what_is_said_of_them() -> None:
    """On verl's own function, in float16."""
    torch = pytest.importorskip("torch")
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    hidden = torch.randn(1, 5, 8, dtype=torch.float16)
    results = FusedLinearForPPO()(hidden, torch.randn(11, 8, dtype=torch.float16), torch.arange(5)[None], 0.7)
    named = zip(("log-probs", "the entropy"), results, strict=True)
    assert rounded_by_torch(Installed()) == [name for name, result in named if result.dtype == torch.float16]


@pytest.mark.verl
@pytest.mark.parametrize("engine", ["fsdp", "fsdp2"])
def test_fsdps_torch_kernels_are_refused_with_what_they_do(engine: str) -> None:
    said = str(fused_kernels.fused_kernel_conflict(settings(backend="torch"), engine, Plan()))
    assert said.startswith(f"{SWITCH}=True: its torch kernels divide logits by the temperature in float16 and return ")
    assert "the entropy in it" in said
    assert f"Fix: set it to false, or {BACKEND}=triton, which computes in float32" in said


@pytest.mark.verl
@pytest.mark.parametrize(("engine", "backend"), [("megatron", "torch"), ("megatron", None), ("fsdp", "triton")])
def test_triton_kernels_are_let_through_and_are_all_that_megatron_has(engine: str, backend: str | None) -> None:
    assert fused_kernels.fused_kernel_conflict(settings(backend=backend), engine, Plan()) is None


def test_triton_kernels_that_round_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rounding = Verl(KERNELS.replace("tl.float32", "tl.float16"))
    monkeypatch.setattr(fused_kernels, "Installed", lambda: rounding)
    said = str(fused_kernels.fused_kernel_conflict(settings(), "megatron", Plan()))
    assert said.startswith(f"{SWITCH}=True: the triton kernels of this release do not divide logits")
    assert said.endswith("Fix: set it to false")


def test_kernels_that_nobody_checked_are_refused_by_name() -> None:
    said = str(fused_kernels.fused_kernel_conflict(settings(backend="liger"), "fsdp", Plan()))
    assert "nobody has checked what its liger kernels compute in" in said


def test_kernels_are_float16s_concern_alone() -> None:
    assert fused_kernels.fused_kernel_conflict(settings(backend="torch"), "fsdp", Plan(mode="bf16")) is None
    assert fused_kernels.fused_kernel_conflict({}.get, "fsdp", Plan()) is None
