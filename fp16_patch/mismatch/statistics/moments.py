"""Computes figures from sums of x, y, x², y² and x·y."""

from __future__ import annotations

import math

CONSTANT_SPREAD = 1e-14
"""A variance below this share of the mean square is rounding of a constant; a correlation with it is NaN."""


def mean(total: float, count: int) -> float:
    """Σx / n; NaN of nothing, as all of these."""
    return total / count if count else math.nan


def population_std(count: int, total: float, squares: float) -> float:
    """√(Σ(x − mean)² / n)."""
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2)) if count else math.nan


def sample_std(count: int, total: float, squares: float) -> float:
    """√(Σ(x − mean)² / (n − 1)), as ``torch.std``; NaN of a single value."""
    return math.sqrt(max(0.0, squares - total**2 / count) / (count - 1)) if count > 1 else math.nan


def effective_share(count: int, excess: float, excess_squares: float) -> float:
    """(Σw)² / (n Σw²), Kish's effective sample size as a share, from the sums of w − 1 and of its square."""
    if not count:
        return math.nan
    squared_sum = (count + excess) ** 2
    # Where all weights are tiny, the sum of their squares is lost to rounding; it is never below this.
    return squared_sum / max(squared_sum, count * (count + 2 * excess + excess_squares))


def spread(count: int, total: float, squares: float) -> float:
    """Σ(x − mean)²; NaN where that is only rounding."""
    if count == 0:
        return math.nan
    value = squares - total * total / count
    return value if value > CONSTANT_SPREAD * squares else math.nan


def slope(count: int, x: float, y: float, x_squares: float, products: float) -> float:
    """Slope of the least-squares line of y on x; NaN if x is constant."""
    return (products - x * y / count) / spread(count, x, x_squares) if count else math.nan


def correlation(count: int, x: float, y: float, x_squares: float, y_squares: float, products: float) -> float:
    """Pearson's correlation of x and y; NaN if one is constant."""
    x_spread, y_spread = spread(count, x, x_squares), spread(count, y, y_squares)
    if math.isnan(x_spread) or math.isnan(y_spread):
        return math.nan
    covariance = products - x * y / count
    return max(-1.0, min(1.0, covariance / math.sqrt(x_spread) / math.sqrt(y_spread)))
