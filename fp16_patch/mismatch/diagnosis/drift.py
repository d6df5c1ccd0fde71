"""Separates a gap's numerics from drift: what it is where both sides hold the same weights, and how it grows with age.

The fit, where no token is that fresh: with n of the numerics and g of the drift, both small and independent,
E[d²] = E[n²] + E[g²], and where both scale alike from token to token, mean|d|² is such a sum, too. An update moves a
log-prob by about as much as the one before, in a direction of its own (g² grows as the lag) or in the same one (as its
square). So mean|d|(lag)² = n² + c·lag^q with 1 ≤ q ≤ 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fp16_patch.mismatch.diagnosis.rounding import MIN_TOKENS
from fp16_patch.mismatch.diagnosis.sentences import Sentences, number
from fp16_patch.mismatch.statistics.by_lag import MOST_LAG
from fp16_patch.mismatch.statistics.summary import MismatchStats

EXPONENTS = torch.linspace(1.0, 2.0, 21, dtype=torch.float64)
CONFIDENT = 1.96
"""Standard errors to either side. Tokens of a sequence resemble each other, so that they hold less than 95 %."""

LEAST_ERROR = 1e-6
"""Of a mean, where rounding leaves no spread."""


@dataclass(frozen=True)
class LagPoint:
    """Mean |d| of the tokens of one lag, nats, with its standard error."""

    tokens: int
    mean_abs: float
    error: float


@dataclass(frozen=True)
class NumericPart:
    """Mean |d| that is not drift, nats, and between what it likely lies.

    Attributes:
        measured: it is of tokens of lag 0; else it is the fit's.
    """

    mean_abs: float
    low: float
    high: float
    measured: bool


@dataclass(frozen=True)
class LagCurve:
    """The mismatch of a run by lag.

    Attributes:
        points: lag → its tokens; of ``MOST_LAG`` stand for all that are as old or older.
        numeric: None where neither fresh tokens nor two other lags are enough to tell.
        unknown: tokens whose lag nobody knows, where that of others is known.
    """

    points: Mapping[int, LagPoint]
    numeric: NumericPart | None
    unknown: int = 0

    @classmethod
    def of(cls, by_lag: Mapping[int, MismatchStats], tokens: int | None = None) -> LagCurve:
        """Take the mismatch by lag, and how many tokens there are in all."""
        points = {lag: _point(stats) for lag, stats in sorted(by_lag.items()) if stats.finite_tokens}
        known = sum(stats.tokens for stats in by_lag.values())
        return cls(points, _numeric_part(points), max(0, (tokens or known) - known) if known else 0)

    @property
    def mean_lag(self) -> float:
        """The lag of a token on average; NaN where there is none."""
        tokens = sum(point.tokens for point in self.points.values())
        return sum(lag * point.tokens for lag, point in self.points.items()) / tokens if tokens else math.nan

    def is_fresh(self) -> bool:
        """Return whether every token was sampled with the learner's weights."""
        return set(self.points) <= {0} and not self.unknown


def drift(curve: LagCurve) -> Sentences:
    """Say how old the samples are, what that makes of the gap, and what numerics make of it; nothing of fresh ones."""
    if curve.is_fresh():
        return ()
    stale = {lag: point for lag, point in curve.points.items() if lag}
    tokens = sum(point.tokens for point in curve.points.values())
    old = sum(point.tokens for point in stale.values())
    behind = sum(lag * point.tokens for lag, point in stale.items()) / old if old else 0.0
    listed = ", ".join(f"{number(point.mean_abs)} at lag {_name(lag)}" for lag, point in curve.points.items())
    return (
        f"{old / tokens:.0%} of {tokens} tokens were sampled with older weights than the learner's, by {behind:.2g} "
        "versions on average.",
        *((f"Of {curve.unknown} more nobody knows how old their weights are.",) if curve.unknown else ()),
        f"Mean |d| is {listed}.",
        _numerics_sentence(curve.numeric),
    )


def _name(lag: int) -> str:
    return f"{lag} and more" if lag == MOST_LAG else str(lag)


def _numerics_sentence(numeric: NumericPart | None) -> str:
    if numeric is None:
        return (
            "What of it is numerics cannot be told: too few tokens are of lag 0, and it takes two other lags to "
            "extrapolate."
        )
    if numeric.measured:
        return f"At lag 0 both sides hold the same weights: {number(numeric.mean_abs)} is numerics, the rest is drift."
    between = f"between {number(numeric.low)} and {number(numeric.high)}"
    return (
        f"Too few tokens are of lag 0: extrapolated to it, numerics make {number(numeric.mean_abs)}, likely {between}."
    )


def _point(stats: MismatchStats) -> LagPoint:
    n = stats.finite_tokens
    mean = stats.d_abs_sum / n
    error = math.sqrt(max(0.0, stats.d_square_sum / n - mean**2) / n)
    return LagPoint(n, mean, max(error, LEAST_ERROR * mean))


def _numeric_part(points: Mapping[int, LagPoint]) -> NumericPart | None:
    enough = {lag: point for lag, point in points.items() if point.tokens >= MIN_TOKENS}
    if 0 in enough:
        fresh, margin = enough[0], CONFIDENT * enough[0].error
        return NumericPart(fresh.mean_abs, max(0.0, fresh.mean_abs - margin), fresh.mean_abs + margin, measured=True)
    older = {lag: point for lag, point in enough.items() if lag < MOST_LAG and point.mean_abs > 0}
    return _extrapolated(older) if len(older) > 1 else None


def _extrapolated(points: Mapping[int, LagPoint]) -> NumericPart:
    """Fit n² and c by weighted least squares for each q; every q that fits about as well as the best is likely."""
    lags = torch.tensor(list(points), dtype=torch.float64)
    means, errors = (
        torch.tensor([getattr(point, name) for point in points.values()], dtype=torch.float64)
        for name in ("mean_abs", "error")
    )
    squares, weights = means.square(), 1 / (2 * means * errors).square().clamp(min=1e-300)
    grown = lags ** EXPONENTS[:, None]
    # The normal equations of squares ≈ n² + c·grown, for each exponent.
    w, wg, wgg = weights.sum(), (weights * grown).sum(1), (weights * grown.square()).sum(1)
    ws, wgs = (weights * squares).sum(), (weights * grown * squares).sum(1)
    determinant = w * wgg - wg.square()
    intercept, slope = (wgg * ws - wg * wgs) / determinant, (w * wgs - wg * ws) / determinant
    misfit = (weights * (squares - intercept[:, None] - slope[:, None] * grown).square()).sum(1)
    error = (wgg / determinant).sqrt() * misfit.div(max(1, len(points) - 2)).clamp(min=1.0).sqrt()
    likely = misfit <= misfit.min() + max(1.0, float(misfit.min()))
    best = int(misfit.argmin()) if len(points) > 2 else len(EXPONENTS) - 1
    low, high = (intercept - CONFIDENT * error)[likely].min(), (intercept + CONFIDENT * error)[likely].max()
    return NumericPart(_root(intercept[best]), _root(low), _root(high), measured=False)


def _root(square: torch.Tensor) -> float:
    return math.sqrt(max(0.0, float(square)))
