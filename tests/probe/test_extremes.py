"""What is kept of a tensor's numbers, against the numbers themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch.probe.extremes import FP16_MAX, FP16_SMALLEST, FP16_SMALLEST_NORMAL, Range, RangeMeter

VALUES = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40)


def seen(*looks: list[float]) -> Range:
    meter = RangeMeter()
    for values in looks:
        meter.look(torch.tensor(values, dtype=torch.float32))
    return meter.read()


@given(VALUES, st.integers(-20, 20))
def test_it_says_what_fits_and_what_underflows(values: list[float], power: int) -> None:
    scale, found = 2.0**power, seen(values)
    magnitudes = torch.tensor(values).double().abs()
    assert found.max_abs == magnitudes.max()
    assert (found.headroom(scale) < 1) == bool((magnitudes * scale > FP16_MAX).any())
    nonzero = magnitudes[magnitudes > 0]
    if len(nonzero):
        below = (nonzero * scale < FP16_SMALLEST_NORMAL).double().mean()
        assert found.share_below(FP16_SMALLEST_NORMAL, scale) == pytest.approx(float(below))


@given(VALUES, VALUES)
def test_several_looks_are_one(first: list[float], second: list[float]) -> None:
    assert seen(first, second) == seen(first + second) == seen(first).merge(seen(second))


def test_what_is_lost_in_float16_is_below_half_its_smallest_number() -> None:
    values = torch.tensor([FP16_SMALLEST / 2 * factor for factor in (0.4, 0.9, 1.1, 4.0)])
    assert seen(values.tolist()).share_below(FP16_SMALLEST / 2) == 0.5
    assert (values.half() == 0).double().mean() == 0.5


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_fp32_does_not_hold_has_no_headroom(value: float) -> None:
    assert seen([1.0, value]).headroom() == 0.0
    assert seen([1.0], [value], [2.0]).headroom() == 0.0
    assert seen([value]).merge(seen([2.0])).headroom() == seen([2.0]).merge(seen([value])).headroom() == 0.0


def test_zeros_alone_fit_and_have_no_exponents() -> None:
    assert seen([0.0, -0.0]).headroom() == math.inf
    assert math.isnan(seen([0.0]).share_below(1.0))


def test_it_is_read_again_as_it_was_written() -> None:
    found = seen([1.0, 3e-9, 7e4])
    assert Range.of_dict(found.as_dict()) == found


def test_looking_waits_for_no_value() -> None:
    """Tensors of the meta device have no values: whatever needs one fails there."""
    meter = RangeMeter()
    meter.look(torch.empty(7, 9, device="meta"))
    meter.look(torch.empty(3, device="meta"))


def test_what_is_not_finite_has_no_exponent() -> None:
    assert seen([1.5, math.inf, math.nan, 0.0]).exponents == {1: 1}
