"""Importance ratios of tokens, and the divergences that are made of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

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


class Ratios(ABC):
    """exp(±d) of n tokens, less one, from one exponential, with no cancellation at small or large ``|d|``.

    Attributes:
        excess: r − 1, the exponent within ±``RATIO_BOUND``, float64 (n,).
        truncated: min(r, 2) − 1, float64 (n,); the same tensor where no ratio is above 2.
    """

    excess: Tensor
    truncated: Tensor
    _spread: Tensor
    """(r − 1)(1 − 1/r), which is 2 (cosh d − 1), with no cancellation."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """Return the sums of the ratios' figures, by their names in ``layout``.

        k3 is the sum of exp(x) − 1 − x over x = d, its reverse over x = −d.

        The Jensen–Shannon divergence of NeMo-RL, 0.5·k3(π‖m) + 0.5·k3(μ‖m) with m = (π + μ)/2, is log cosh(d/2), which
        is 0.5·log1p((cosh d − 1)/2).
        """

    def _js_sum(self) -> Tensor:
        # In float32, which costs a third: nothing cancels any more, so that its 6e-8 are relative to the result.
        return self._spread.float().mul_(0.25).log1p_().double().sum() * 0.5


def ratios_of(d: Tensor, magnitude: Tensor, reach: float) -> Ratios:
    """Choose how ratios are computed, by how large they can be.

    Args:
        reach: a bound of the magnitude; what no token reaches is not looked for.
    """
    return ModerateRatios(d) if reach < _TRUNCATED_FROM else AnyRatios(d, magnitude)


class ModerateRatios(Ratios):
    """None is above 2, and none far from 1, so that most sums follow from others."""

    def __init__(self, d: Tensor) -> None:
        self._d = d
        self.excess = self.truncated = torch.expm1(d)
        self._decline = self.excess / (self.excess + 1.0)  # 1 − 1/r
        self._spread = self.excess * self._decline

    def sums(self) -> dict[str, Tensor]:
        k3 = (self.excess - self._d).sum()
        excess, square = self.excess.sum(), torch.dot(self.excess, self.excess)
        spread = self._spread.sum()
        return {
            "k3_sum": k3,
            "k3_reverse_sum": spread - k3,
            "js_sum": self._js_sum(),
            # Of r and 1/r, the one that is above 1 is farther from it, by the spread.
            "expm1_abs_sum": (self.excess.abs().sum() + self._decline.abs().sum() + spread) * 0.5,
            "capped_expm1_sum": excess,
            "expm1_sum": excess,
            "expm1_square_sum": square,
            "truncated_expm1_sum": excess,
            "truncated_expm1_square_sum": square,
        }


class AnyRatios(Ratios):
    """However large ``|d|`` is; exponents are clamped to ``EXPONENT_CAP``."""

    def __init__(self, d: Tensor, magnitude: Tensor) -> None:
        self._magnitude = magnitude.clamp(max=EXPONENT_CAP)
        self._growth = torch.expm1(self._magnitude)
        self._decline = self._growth / (self._growth + 1.0)  # 1 − exp(−|d|)
        self._spread = self._growth * self._decline
        # 1.0 or 0.0, because sums weighted by it cost less than a choice for each token.
        self._positive = torch.gt(d, 0.0, out=torch.empty_like(d))
        self.excess = (self._growth + self._decline).mul_(self._positive).sub_(self._decline)
        self._capped_sum = self.excess.sum()
        self.excess.clamp_(math.expm1(-RATIO_BOUND), math.expm1(RATIO_BOUND))
        self.truncated = self.excess.clamp(max=TRUNCATION - 1.0)

    def sums(self) -> dict[str, Tensor]:
        above = self._growth - self._magnitude
        below = self._magnitude - self._decline
        negative = 1.0 - self._positive
        return {
            "k3_sum": torch.dot(above, self._positive) + torch.dot(below, negative),
            "k3_reverse_sum": torch.dot(above, negative) + torch.dot(below, self._positive),
            "js_sum": self._js_sum(),
            "expm1_abs_sum": self._growth.sum(),
            "capped_expm1_sum": self._capped_sum,
            "expm1_sum": self.excess.sum(),
            "expm1_square_sum": torch.dot(self.excess, self.excess),
            "truncated_expm1_sum": self.truncated.sum(),
            "truncated_expm1_square_sum": torch.dot(self.truncated, self.truncated),
        }


def bounded_ratio(d: float, low: float = -RATIO_BOUND, high: float = RATIO_BOUND) -> float:
    """Return exp(d), its exponent kept within bounds."""
    return math.exp(max(low, min(high, d)))
