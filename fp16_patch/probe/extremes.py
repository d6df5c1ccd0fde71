"""How large and how small the numbers of one tensor get, over many looks, in terms of FP16's range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp16_patch.scaling.tensor_range import FP16_MAX, FP16_SMALLEST, FP16_SMALLEST_NORMAL, abs_max

__all__ = ["FP16_MAX", "FP16_SMALLEST", "FP16_SMALLEST_NORMAL", "Range", "RangeMeter"]

SAMPLED_ELEMENTS = 1 << 14
"""Of each look so many elements, evenly spread, are counted by their exponent; the extremes are over all."""

LOWEST_EXPONENT, HIGHEST_EXPONENT = -150, 129


@dataclass(frozen=True)
class Range:
    """What was seen of one tensor.

    Attributes:
        max_abs: largest |x|; NaN or infinite where the tensor had such elements.
        exponents: e → how many of the sampled elements have 2^(e−1) ≤ |x| < 2^e. Zeros are not among them.
        elements: how many were looked at, for ``max_abs``.
    """

    max_abs: float
    exponents: dict[int, int]
    elements: int

    def headroom(self, scale: float = 1.0) -> float:
        """Return 65504 ÷ (largest |x| · ``scale``): below 1 it does not fit FP16; infinite for a tensor of zeros."""
        if not math.isfinite(self.max_abs):
            return 0.0
        return FP16_MAX / (self.max_abs * scale) if self.max_abs else math.inf

    def share_below(self, bound: float, scale: float = 1.0) -> float:
        """Return the share of the non-zero elements with |x|·scale below ``bound``; NaN with none.

        Exact where bound ÷ scale is a power of two, else an element counts by the upper end of its power of two.
        """
        total = sum(self.exponents.values())
        below = sum(count for exponent, count in self.exponents.items() if 2.0**exponent <= bound / scale)
        return below / total if total else math.nan

    def merge(self, other: Range) -> Range:
        """Return both together. A NaN on either side stays."""
        exponents = dict(self.exponents)
        for exponent, count in other.exponents.items():
            exponents[exponent] = exponents.get(exponent, 0) + count
        largest = math.nan if math.isnan(other.max_abs) else max(self.max_abs, other.max_abs)
        return Range(self.max_abs if math.isnan(self.max_abs) else largest, exponents, self.elements + other.elements)

    def as_dict(self) -> dict[str, Any]:
        return {
            "max_abs": self.max_abs,
            "elements": self.elements,
            "subnormal_share": self.share_below(FP16_SMALLEST_NORMAL),
            "exponents": {str(exponent): count for exponent, count in sorted(self.exponents.items())},
        }

    @classmethod
    def of_dict(cls, state: dict[str, Any]) -> Range:
        """Make a range of what ``as_dict`` returned."""
        exponents = {int(exponent): count for exponent, count in state["exponents"].items()}
        return cls(state["max_abs"], exponents, state["elements"])


class RangeMeter:
    """Collects a ``Range``. It stays on the tensor's device until it is read, so that looking does not wait for it."""

    def __init__(self) -> None:
        self._max: Tensor | None = None
        self._counts: Tensor | None = None
        self._elements = 0

    @torch.no_grad()
    def look(self, values: Tensor, exponents: bool = True) -> None:
        """Look at a tensor of real numbers, of any shape and dtype; without their exponents it is quicker."""
        if not values.numel():
            return
        values = values.detach()
        largest = abs_max(values).float()
        self._max = largest if self._max is None else torch.maximum(self._max, largest)
        self._elements += values.numel()
        if exponents:
            counts = _exponent_counts(values)
            self._counts = counts if self._counts is None else self._counts + counts

    def read(self) -> Range:
        if self._max is None:
            return Range(0.0, {}, 0)
        counts = [] if self._counts is None else self._counts.tolist()
        exponents = {LOWEST_EXPONENT + place: count for place, count in enumerate(counts) if count}
        return Range(float(self._max), exponents, self._elements)


def _exponent_counts(values: Tensor) -> Tensor:
    """Count ``SAMPLED_ELEMENTS`` of the values by the exponent of ``frexp``, those that are finite and not 0."""
    flat = values.reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)].float()
    counted = torch.isfinite(sample) & (sample != 0)
    exponents = torch.frexp(torch.where(counted, sample, 1.0)).exponent.clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT)
    # Neither a choice by value nor torch.bincount, whose shapes the host would wait for.
    counts = torch.zeros(HIGHEST_EXPONENT - LOWEST_EXPONENT + 1, dtype=torch.int64, device=sample.device)
    return counts.scatter_add_(0, exponents.long() - LOWEST_EXPONENT, counted.long())
