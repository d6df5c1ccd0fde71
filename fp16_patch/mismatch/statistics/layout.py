"""Lays out every figure and every table of the mismatch in one flat vector of float64.

Every part is merged in one way: added, the lesser, the greater. The worst tokens, at the end, are merged by
``fp16_patch.mismatch.statistics.worst``. Counts are exact up to 2^53.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.bins import (
    BIN_COUNT,
    EDGES,
    LENGTH_BAND_COUNT,
    POSITION_BAND_COUNT,
    PROBABILITY_BIN_COUNT,
    SUM_BIN_COUNT,
)
from fp16_patch.mismatch.statistics.figures import Part, names_of

TOKEN_COUNTS = names_of(Part.TOKEN_COUNTS)
TOKEN_SUMS = names_of(Part.TOKEN_SUMS)
TOKENS_OF_SEQUENCES = names_of(Part.TOKENS_OF_SEQUENCES)
SEQUENCE_SUMS = names_of(Part.SEQUENCE_SUMS)
SEQUENCE_COUNTS = names_of(Part.SEQUENCE_COUNTS)
LEAST = names_of(Part.LEAST)
GREATEST = names_of(Part.GREATEST)
MAGNITUDES = names_of(Part.MAGNITUDES)

COUNT_TABLES = {
    "histogram": BIN_COUNT,
    "joint": PROBABILITY_BIN_COUNT**2,
    "density": LENGTH_BAND_COUNT * SUM_BIN_COUNT,
    "position_tokens": POSITION_BAND_COUNT,
    "length_sequences": LENGTH_BAND_COUNT,
    "edge_tokens": PROBABILITY_BIN_COUNT * len(EDGES),
}
SUM_TABLES = {
    "probability_d": PROBABILITY_BIN_COUNT,
    "probability_d_abs": PROBABILITY_BIN_COUNT,
    "probability_d_square": PROBABILITY_BIN_COUNT,
    "position_d": POSITION_BAND_COUNT,
    "position_d_abs": POSITION_BAND_COUNT,
    "position_d_square": POSITION_BAND_COUNT,
    "length_sum": LENGTH_BAND_COUNT,
    "length_abs_sum": LENGTH_BAND_COUNT,
    "length_square_sum": LENGTH_BAND_COUNT,
    "edge_d_abs": PROBABILITY_BIN_COUNT * len(EDGES),
}
MAGNITUDE_TABLES = {
    "probability_d_abs_max": PROBABILITY_BIN_COUNT,
    "position_d_abs_max": POSITION_BAND_COUNT,
    "length_abs_max": LENGTH_BAND_COUNT,
}

WORST_TOKENS = 16
WORST_COLUMNS = ("magnitude", "sampler", "learner", "sequence", "position", "token_id")
NO_TOKEN = -1.0
"""The magnitude of a row of the worst tokens that holds none."""

COUNTS = frozenset({*TOKEN_COUNTS, *TOKENS_OF_SEQUENCES, *SEQUENCE_COUNTS})
_ADDED_SCALARS = (*TOKEN_COUNTS, *TOKEN_SUMS, *TOKENS_OF_SEQUENCES, *SEQUENCE_SUMS, *SEQUENCE_COUNTS)
_ADDED = dict.fromkeys(_ADDED_SCALARS, 1) | COUNT_TABLES | SUM_TABLES
_LESSER = dict.fromkeys(LEAST, 1)
_GREATER = dict.fromkeys((*GREATEST, *MAGNITUDES), 1) | MAGNITUDE_TABLES
_SIZES = _ADDED | _LESSER | _GREATER | {"worst": WORST_TOKENS * len(WORST_COLUMNS)}

SCALARS = (*_ADDED_SCALARS, *LEAST, *GREATEST, *MAGNITUDES)
TABLES = (*COUNT_TABLES, *SUM_TABLES, *MAGNITUDE_TABLES)


def _slices(sizes: Mapping[str, int]) -> dict[str, slice]:
    ends = list(accumulate(sizes.values()))
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


SLICES = _slices(_SIZES)
STATE_SIZE = sum(_SIZES.values())

ADDED_PART = slice(0, sum(_ADDED.values()))
LESSER_PART = slice(ADDED_PART.stop, ADDED_PART.stop + sum(_LESSER.values()))
GREATER_PART = slice(LESSER_PART.stop, LESSER_PART.stop + sum(_GREATER.values()))
WORST_PART = SLICES["worst"]


def table(vector: Tensor, name: str) -> Tensor:
    """Return a table's part of a vector, flat; counts as int64."""
    part = vector[SLICES[name]]
    return part.to(torch.int64) if name in COUNT_TABLES else part


def start_of(name: str) -> float:
    """Return the value of a figure that has seen no token: the neutral element of its merging."""
    if name in LEAST:
        return math.inf
    return -math.inf if name in GREATEST else 0.0


def empty_vector(device: torch.device | str = "cpu") -> Tensor:
    """Make the state of no tokens, float64 of shape ``(STATE_SIZE,)``."""
    vector = torch.zeros(STATE_SIZE, dtype=torch.float64, device=device)
    for name in (*LEAST, *GREATEST):
        vector[SLICES[name]] = start_of(name)
    vector[WORST_PART] = NO_TOKEN
    return vector
