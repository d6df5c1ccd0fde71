"""Keeps the sums inside matrix products in FP32, and tells what they may be in.

cuBLAS may split a product along its inner dimension and add up the parts in the operands' own dtype; torch allows it by
default. In FP16 a part may overflow where the whole would not, and learner and sampler split differently.
https://pytorch.org/docs/stable/notes/cuda.html, "Reduced Precision Reduction in FP16 GEMMs"
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from fp16_patch.patching.import_hooks import when_imported
from fp16_patch.plan.dtypes import BFLOAT16, FLOAT16, FLOAT32, torch_name

QUANTITY = "gemm_sum"
"""What the ledger calls the dtype of these sums."""
TF32 = "tfloat32"
"""FP32 operands cut to 11 bits of significand, as many as FP16 has."""

IEEE_ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee", "VLLM_FLOAT32_MATMUL_PRECISION": "highest"}
"""Keeps TF32 out of FP32 products: those of Triton's kernels, vLLM's attention among them, and torch's in vLLM."""

# Operands' dtype → torch's switches that let their products be added up in it. torch 2.6 and older lack the last.
_SWITCHES = {
    FLOAT16.torch: ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"),
    BFLOAT16.torch: ("allow_bf16_reduced_precision_reduction",),
}


class SumsInFP32:
    """Turns torch's switches off in this process, now or when torch is imported, and back on."""

    def __init__(self) -> None:
        self._turned_off: list[str] = []
        self._wait_no_more: Callable[[], None] = lambda: None

    def hold(self) -> None:
        """Turn off every switch that is on."""
        self._wait_no_more()
        self._wait_no_more = when_imported("torch", self._turn_off)

    def release(self) -> None:
        """Turn those that were on back on."""
        self._wait_no_more()
        for name in self._turned_off:
            setattr(_matmul(sys.modules["torch"]), name, True)
        self._turned_off.clear()

    def _turn_off(self, torch: ModuleType) -> None:
        for name in (name for names in _SWITCHES.values() for name in names):
            if _is_on(torch, name):
                setattr(_matmul(torch), name, False)
                self._turned_off.append(name)


@contextmanager
def sums_in_fp32() -> Iterator[None]:
    """Hold the switches off in this block."""
    sums = SumsInFP32()
    sums.hold()
    try:
        yield
    finally:
        sums.release()


def sums_of(operands: Iterable[str], *, of_sampler: bool) -> set[str]:
    """Return the dtypes that products of operands in these dtypes may be added up in, as this process is set now.

    Args:
        operands: torch's names of dtypes.
        of_sampler: Triton's kernels compute attention, too.

    Returns:
        Torch's names, or `TF32`; none where torch is not imported.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return set()
    return {_sum_of(torch, torch_name(dtype), of_sampler) for dtype in operands}


def _sum_of(torch: ModuleType, operand: str, of_sampler: bool) -> str:
    if operand == FLOAT32.torch:
        tf32 = _torch_uses_tf32(torch) or (of_sampler and _triton_uses_tf32())
        return TF32 if tf32 else FLOAT32.torch
    return operand if any(_is_on(torch, name) for name in _SWITCHES.get(operand, ())) else FLOAT32.torch


def _triton_uses_tf32() -> bool:
    return os.environ.get("TRITON_F32_DEFAULT", "tf32") != IEEE_ENVIRONMENT["TRITON_F32_DEFAULT"]


def _torch_uses_tf32(torch: ModuleType) -> bool:
    # Read in the newer way where there is one: the older raises once somebody has set it in the newer.
    precision = getattr(_matmul(torch), "fp32_precision", None)
    return bool(_matmul(torch).allow_tf32 if precision is None else precision == "tf32")


def _is_on(torch: ModuleType, name: str) -> bool:
    return bool(getattr(_matmul(torch), name, False))


def _matmul(torch: ModuleType) -> Any:
    return torch.backends.cuda.matmul
