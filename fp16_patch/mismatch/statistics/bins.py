"""Which values share a bin, in each histogram of the mismatch.

Indices are computed in float32: an edge is where it is said to be up to about 1e-4 of the bin's width, and there for
every batch. Source of the log-spaced bins: Masson, Rim, Lee, "DDSketch" (VLDB 2019).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# d of a token: 1e-9 to 1e3 on either side of a zero bin.
BINS_PER_DECADE = 120
DECADES = 12
SMALLEST_MAGNITUDE = 1e-9
BINS_PER_SIGN = BINS_PER_DECADE * DECADES
ZERO_BIN = BINS_PER_SIGN
BIN_COUNT = 2 * BINS_PER_SIGN + 1
BIN_RATIO = 10 ** (1 / BINS_PER_DECADE)
QUANTILE_RELATIVE_ERROR = (BIN_RATIO - 1) / (BIN_RATIO + 1)

# D of a sequence: 1e-4 to 1e4 on either side of a zero bin.
SUM_BINS_PER_DECADE = 4
SMALLEST_SUM = 1e-4
SUM_BINS_PER_SIGN = SUM_BINS_PER_DECADE * 8
SUM_BIN_COUNT = 2 * SUM_BINS_PER_SIGN + 1

# Probabilities: a quarter of a decade of p below a half, of 1 − p above it.
PROBABILITY_BINS_PER_DECADE = 4
_FIRST_STEP, _LAST_STEP = 2, 23
_STEPS = range(_FIRST_STEP, _LAST_STEP + 1)
PROBABILITY_BINS_BELOW_HALF = len(_STEPS) + 1
PROBABILITY_BIN_COUNT = 2 * PROBABILITY_BINS_BELOW_HALF
PROBABILITY_BAND_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0)

# Positions: the first token, powers of two up to 2^20, the last token, those after and before a gap in the mask, as a
# tool's answer makes one. Lengths: powers of two up to 2^20.
POWERS_OF_TWO = 21
FIRST_POSITION, LAST_POSITION, AFTER_GAP, BEFORE_GAP = 0, POWERS_OF_TWO + 1, POWERS_OF_TWO + 2, POWERS_OF_TWO + 3
POSITION_BAND_COUNT = POWERS_OF_TWO + 4
EDGES = {"first": FIRST_POSITION, "last": LAST_POSITION, "after a gap": AFTER_GAP, "before a gap": BEFORE_GAP}
"""The bands that are one place of a sequence."""

LENGTH_BAND_COUNT = POWERS_OF_TWO


def bin_edges() -> Tensor:
    """Return the edges of the bins of ``|d|`` above the zero bin, 1e-9 … 1e3, float64 ``(BINS_PER_SIGN + 1,)``."""
    exponents = torch.arange(BINS_PER_SIGN + 1, dtype=torch.float64) / BINS_PER_DECADE
    return SMALLEST_MAGNITUDE * torch.pow(10.0, exponents)


def bin_values() -> Tensor:
    """Return the value that stands for each bin of ``d``, float64 of shape ``(BIN_COUNT,)``.

    ``2·edge_low·edge_high / (edge_low + edge_high)``, whose relative error is the same, (γ−1)/(γ+1), at both edges.
    """
    edges = bin_edges()
    positive = 2 * edges[:-1] * edges[1:] / (edges[:-1] + edges[1:])
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def sum_edges() -> Tensor:
    """Return the edges of the bins of ``D``, float64 of shape ``(SUM_BIN_COUNT + 1,)``, ascending.

    The outermost bins are open: what lies beyond ±1e4 is in them.
    """
    exponents = torch.arange(SUM_BINS_PER_SIGN + 1, dtype=torch.float64) / SUM_BINS_PER_DECADE
    positive = SMALLEST_SUM * torch.pow(10.0, exponents)
    return torch.cat([-positive.flip(0), positive])


def length_edges() -> Tensor:
    """Return the edges of the bands of lengths, float64 of shape ``(LENGTH_BAND_COUNT + 1,)``: 1, 2, 4, … 2^20, ∞."""
    edges = torch.pow(2.0, torch.arange(LENGTH_BAND_COUNT + 1, dtype=torch.float64))
    edges[-1] = math.inf
    return edges


def probability_edges() -> Tensor:
    """Return the edges of the bins of a probability, float64 of shape ``(PROBABILITY_BIN_COUNT + 1,)``, from 0 to 1.

    A quarter of a decade apart, in p below a half and in 1 − p above: 0, 1.8e-6 … 0.1, 0.18, 0.32, 0.5, 0.68, 0.82, 0.9
    … 1 − 1.8e-6, 1.
    """
    steps = torch.tensor(_STEPS, dtype=torch.float64)
    tail = torch.pow(10.0, -steps / PROBABILITY_BINS_PER_DECADE)
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    return torch.cat([ends[:1], tail.flip(0), ends[1:2], 1 - tail, ends[2:]])


def difference_bin(d: Tensor) -> Tensor:
    """Return the bin of each ``d``, int64 in ``[0, BIN_COUNT)``."""
    return _signed_bin(d, SMALLEST_MAGNITUDE, BINS_PER_DECADE, BINS_PER_SIGN)


def sum_bin(sums: Tensor) -> Tensor:
    """Return the bin of each ``D``, int64 in ``[0, SUM_BIN_COUNT)``."""
    return _signed_bin(sums, SMALLEST_SUM, SUM_BINS_PER_DECADE, SUM_BINS_PER_SIGN)


def probability_bin(probability: Tensor) -> Tensor:
    """Return the bin of each probability, int32 in ``[0, PROBABILITY_BIN_COUNT)``; above 1 it is the last.

    The bins lie symmetrically about a half, so one logarithm, of what is the less of p and 1 − p, is enough.

    Args:
        probability: float64, so that 1 − p is known near 1.
    """
    half = PROBABILITY_BIN_COUNT / 2
    above = probability - 0.5
    side = above.float()
    tail = above.abs_().neg_().add_(0.5).float().clamp_(min=1e-30)
    # From the middle towards the end where the tail is; within the bin at the end it may be anywhere.
    distance = torch.rsub(tail.log_(), half - _LAST_STEP - 1, alpha=PROBABILITY_BINS_PER_DECADE / math.log(10))
    return distance.clamp_(max=half - 0.5).copysign_(side).add_(half).int()


def position_band(position: Tensor) -> Tensor:
    """Return the band of each position, int32: 0 for the first token, ``k`` for ``2^(k−1) ≤ position < 2^k``."""
    return torch.frexp(position.double()).exponent.clamp_(max=POWERS_OF_TWO)


@lru_cache(maxsize=8)
def bands_of_positions(count: int, device: torch.device) -> Tensor:
    """Return the bands of at least so many positions from 0 on, int32; not to be written to."""
    return position_band(torch.arange(1 << (count - 1).bit_length(), device=device))


def length_band(length: Tensor) -> Tensor:
    """Return the band of each length, int64: ``k`` for ``2^k ≤ length < 2^(k+1)``; a length of 0 is in band 0."""
    return torch.frexp(length.double()).exponent.sub(1).clamp(0, LENGTH_BAND_COUNT - 1).long()


def _signed_bin(values: Tensor, smallest: float, per_decade: int, per_sign: int) -> Tensor:
    """Return the bin of each value: ``|value| < smallest`` in the middle, what is too large at the ends."""
    values = values.float()
    magnitude = torch.rsub(
        values.abs().log2_(), 1 - per_decade * math.log10(smallest), alpha=-per_decade * math.log10(2)
    )
    # By way of int32: two conversions that are vectorized cost less than one that is not.
    return magnitude.clamp_(0, per_sign).copysign_(values).int().add_(per_sign).long()
