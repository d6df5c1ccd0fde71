"""Reads from a state what it says of parts of the tokens: by probability, position and length, and the worst."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics import bins
from fp16_patch.mismatch.statistics.layout import NO_TOKEN, WORST_PART, WORST_TOKENS, table
from fp16_patch.mismatch.statistics.moments import mean, population_std

MATCHED_TOKENS = 5
"""So many tokens of a bin of probabilities say what mean |d| is in it."""


@dataclass(frozen=True)
class Band:
    """``d`` over the finite tokens of a band, ``low ≤ x < high``; ``d_square_mean`` is the mean of ``d²``."""

    label: str
    low: float
    high: float
    tokens: int
    d_mean: float
    d_abs_mean: float
    d_square_mean: float
    d_abs_max: float


@dataclass(frozen=True)
class Edge:
    """One place of the sequences, such as their first tokens, against the tokens that lie at no edge.

    Attributes:
        rest_abs_mean: mean |d| of the tokens at no edge.
        expected_abs_mean: what it were at the probabilities of this edge's tokens; NaN where too few of them have a
            match. A token that is less sure has more of a gap, wherever it lies.
    """

    band: Band
    rest_abs_mean: float
    expected_abs_mean: float


@dataclass(frozen=True)
class LengthBand:
    """``D`` over the finite sequences of ``low ≤ length < high`` sampled tokens; ``std`` is that of the population."""

    low: float
    high: float
    sequences: int
    mean_abs: float
    mean: float
    std: float
    max_abs: float


@dataclass(frozen=True)
class WorstToken:
    """A token of large ``|d|``; ``token_id`` is −1 where it was not given.

    ``position`` counts places of the batch from the sequence's first sampled token, which is at 0.
    """

    d: float
    sampler: float
    learner: float
    sequence: int
    position: int
    token_id: int


def probability_bands(vector: Tensor) -> list[Band]:
    """Band ``d`` by the sampler's probability; see ``MismatchStats``. All take a state vector on the host."""
    counts = table(vector, "joint").view(bins.PROBABILITY_BIN_COUNT, -1).sum(1)
    edges = bins.PROBABILITY_BAND_EDGES
    nearly = torch.tensor(edges, dtype=torch.float64) * (1 - 1e-9)
    cuts = torch.searchsorted(bins.probability_edges(), nearly).tolist()
    bands = (
        _band(vector, "probability", counts, slice(first, last), (f"{low:g}–{high:g}", low, high))
        for first, last, low, high in zip(cuts, cuts[1:], edges, edges[1:], strict=False)
    )
    return [band for band in bands if band.tokens]


def position_bands(vector: Tensor) -> list[Band]:
    """Band ``d`` by the position in the sequence; see ``MismatchStats.position_bands``."""
    counts = table(vector, "position_tokens")
    between = [(2 ** (index - 1), 2**index) for index in range(1, bins.LAST_POSITION)]
    limits: list[tuple[str, float, float]] = [
        ("first", 0, 1),
        *((_whole_range(low, high), low, high) for low, high in between),
        *((name, math.nan, math.nan) for name in ("last", "after a gap", "before a gap")),
    ]
    bands = (_band(vector, "position", counts, slice(at, at + 1), limit) for at, limit in enumerate(limits))
    return [band for band in bands if band.tokens]


def edges(vector: Tensor) -> list[Edge]:
    """Set each edge of the sequences against the tokens at none; see ``MismatchStats.edges``."""
    tokens, magnitudes = (table(vector, f"edge_{name}").view(-1, len(bins.EDGES)) for name in ("tokens", "d_abs"))
    rest_tokens = table(vector, "joint").view(bins.PROBABILITY_BIN_COUNT, -1).sum(1) - tokens.sum(1)
    rest_magnitudes = table(vector, "probability_d_abs") - magnitudes.sum(1)
    matched = rest_tokens >= MATCHED_TOKENS
    rest_means = torch.where(matched, rest_magnitudes / rest_tokens.clamp(min=1), 0.0)
    rest = mean(float(rest_magnitudes.sum()), int(rest_tokens.sum()))
    bands = {band.label: band for band in position_bands(vector)}
    found = []
    for column, name in enumerate(bins.EDGES):
        if name in bands:
            counted = torch.where(matched, tokens[:, column], 0)
            enough = 2 * int(counted.sum()) >= bands[name].tokens
            expected = mean(float(counted.double() @ rest_means), int(counted.sum())) if enough else math.nan
            found.append(Edge(bands[name], rest, expected))
    return found


def length_bands(vector: Tensor) -> list[LengthBand]:
    """Band ``D`` by the number of sampled tokens; see ``MismatchStats.by_length``."""
    edges = bins.length_edges().tolist()
    names = ("sequences", "sum", "abs_sum", "square_sum", "abs_max")
    columns = (table(vector, f"length_{name}").tolist() for name in names)
    return [
        LengthBand(low, high, n, magnitude / n, total / n, population_std(n, total, square), most)
        for low, high, n, total, magnitude, square, most in zip(edges, edges[1:], *columns, strict=False)
        if n
    ]


def worst_tokens(vector: Tensor) -> list[WorstToken]:
    """Return the tokens of largest ``|d|``; see ``MismatchStats.worst_tokens``."""
    return [
        WorstToken(learner - sampler, sampler, learner, int(sequence), int(position), int(token_id))
        for magnitude, sampler, learner, sequence, position, token_id in vector[WORST_PART]
        .view(WORST_TOKENS, -1)
        .tolist()
        if magnitude != NO_TOKEN
    ]


def _band(vector: Tensor, kind: str, counts: Tensor, at: slice, limit: tuple[str, float, float]) -> Band:
    n = int(counts[at].sum())
    d, d_abs, d_square = (
        mean(float(table(vector, f"{kind}_{name}")[at].sum()), n) for name in ("d", "d_abs", "d_square")
    )
    label, low, high = limit
    return Band(label, low, high, n, d, d_abs, d_square, float(table(vector, f"{kind}_d_abs_max")[at].max()))


def _whole_range(low: int, high: int) -> str:
    return str(low) if high == low + 1 else f"{low}–{high - 1}"
