"""How dtypes are spelled: every name of one means it, and what is none of ours keeps its own."""

from __future__ import annotations

import pytest

from fp16_patch.plan.dtypes import BFLOAT16, DTYPES, FLOAT16, FLOAT32, Spelling, is_half, spelling_of, torch_name


@pytest.mark.parametrize("spelling", DTYPES, ids=lambda spelling: spelling.torch)
def test_every_name_means_its_dtype(spelling: Spelling) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, spelling.torch)
    for name in (*spelling.all, f"torch.{spelling.torch}", dtype):
        assert spelling_of(name) is spelling
        assert torch_name(name) == spelling.torch
        assert is_half(name) == (dtype.itemsize == 2)
    assert getattr(torch.zeros(1, dtype=torch.float64), spelling.method)().dtype is dtype


def test_names_are_listed_once() -> None:
    assert [spelling.all for spelling in (FLOAT16, BFLOAT16, FLOAT32)] == [
        ("float16", "fp16", "half"),
        ("bfloat16", "bf16"),
        ("float32", "fp32", "float"),
    ]


@pytest.mark.parametrize("other", ["int8", "torch.float64", "auto", None])
def test_what_a_plan_cannot_decide_keeps_its_name(other: object) -> None:
    assert not is_half(other)
    with pytest.raises(ValueError, match="none of the dtypes"):
        spelling_of(other)
    assert torch_name(other) == str(other).removeprefix("torch.")
