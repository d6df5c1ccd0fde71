"""Importance ratios of tokens, and the divergences that are made of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXPONENT_CAP = 88.0
"""Exponents are clamped here, near the end of float32: where verl and NeMo-RL overflow to inf, sums stay finite."""

RATIO_BOUND = 20.0
"""Exponents of importance weights are clamped to ± this, as verl's ``SAFETY_BOUND`` has it."""

TRUNCATION = 2.0
"""verl's default upper threshold of truncated importance sampling; its lower one is the reciprocal, as is IcePop's."""

ICEPOP_HIGH = 5.0
_TRUNCATED_FROM = math.log(TRUNCATION)


class Ratios:
    """exp(±d) of n tokens, less one, from one exponential, with no cancellation at small or large ``|d|``.

    Args:
        reach: a bound of ``|d|``; what no token reaches is not looked for.

    Attributes:
        excess: r − 1, the exponent within ±``RATIO_BOUND``, float64 (n,).
        truncated: min(r, 2) − 1, float64 (n,); the same tensor where no ratio is above 2.
    """

    def __init__(self, d: Tensor, magnitude: Tensor, reach: float = math.inf) -> None:
        self._magnitude = magnitude if reach <= EXPONENT_CAP else magnitude.clamp(max=EXPONENT_CAP)
        self._growth = torch.expm1(self._magnitude)
        self._decline = self._growth / (self._growth + 1.0)  # 1 − exp(−|d|)
        # 1.0 or 0.0, because sums weighted by it cost less than a choice for each token.
        self._positive = torch.gt(d, 0.0, out=torch.empty_like(d))
        self.excess = (self._growth + self._decline).mul_(self._positive).sub_(self._decline)
        self._capped_sum = self.excess.sum()
        if reach > RATIO_BOUND:
            self.excess.clamp_(math.expm1(-RATIO_BOUND), math.expm1(RATIO_BOUND))
        self.truncated = self.excess if reach < _TRUNCATED_FROM else self.excess.clamp(max=TRUNCATION - 1.0)

    def sums(self) -> dict[str, Tensor]:
        """k3 is the sum of exp(x) − 1 − x over x = d, its reverse over x = −d.

        The Jensen–Shannon divergence of NeMo-RL, 0.5·k3(π‖m) + 0.5·k3(μ‖m) with m = (π + μ)/2, is log cosh(d/2), which
        is 0.5·log1p((cosh d − 1)/2).
        """
        above = self._growth - self._magnitude
        below = self._magnitude - self._decline
        negative = 1.0 - self._positive
        # In float32, which costs a third: nothing cancels any more, so that its 6e-8 are relative to the result.
        js = self._growth.mul(self._decline).mul_(0.25).float().log1p_()
        excess = {"sum": self.excess.sum(), "square_sum": torch.dot(self.excess, self.excess)}
        truncated = excess
        if self.truncated is not self.excess:
            truncated = {"sum": self.truncated.sum(), "square_sum": torch.dot(self.truncated, self.truncated)}
        return {
            "k3_sum": torch.dot(above, self._positive) + torch.dot(below, negative),
            "k3_reverse_sum": torch.dot(above, negative) + torch.dot(below, self._positive),
            "js_sum": js.sum(dtype=torch.float64) * 0.5,
            "expm1_abs_sum": self._growth.sum(),
            "capped_expm1_sum": self._capped_sum,
            **{f"expm1_{name}": value for name, value in excess.items()},
            **{f"truncated_expm1_{name}": value for name, value in truncated.items()},
        }


def bounded_ratio(d: float, low: float = -RATIO_BOUND, high: float = RATIO_BOUND) -> float:
    """exp(d), its exponent kept within bounds."""
    return math.exp(max(low, min(high, d)))
