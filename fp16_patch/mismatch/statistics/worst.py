"""The tokens with the largest ``|d|``.

Ties are broken by everything that is kept of a token, so that the order is total and merging is associative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp16_patch.mismatch.statistics.layout import WORST_COLUMNS, WORST_TOKENS


def largest(magnitude: Tensor, count: int = WORST_TOKENS) -> Tensor:
    """Indices of the ``count`` largest of a flat tensor, largest first, of equal ones the earlier first.

    In two stages, of which each sorts about √n values: a value among the largest is in one of the ``count`` blocks
    whose maxima are the largest. No synchronization. Fewer indices if there are fewer values.
    """
    width = max(1, math.isqrt(magnitude.numel() // count))
    blocks = pad(magnitude, (0, -magnitude.numel() % width), value=-math.inf).view(-1, width)
    chosen = blocks.amax(1).sort(descending=True, stable=True).indices[:count].sort().values
    candidates = blocks.index_select(0, chosen).flatten().sort(descending=True, stable=True).indices
    candidates = candidates[: min(count, magnitude.numel())]
    return chosen[candidates // width] * width + candidates % width


def worst_rows(rows: Tensor) -> Tensor:
    """The ``WORST_TOKENS`` first rows by descending magnitude, then by the other columns, sequence and position first.

    Args:
        rows: float64 of shape (n, columns), n at least ``WORST_TOKENS``; columns as in ``WORST_COLUMNS``.
    """
    magnitude, sampler, learner, sequence, position, token_id = rows.unbind(1)
    order = torch.arange(len(rows), device=rows.device)
    for key in (learner, sampler, token_id, position, sequence, -magnitude):
        order = order[key[order].argsort(stable=True)]
    return rows[order[:WORST_TOKENS]]


def no_rows(count: int, device: torch.device) -> Tensor:
    """Rows that hold no token."""
    return torch.full((count, len(WORST_COLUMNS)), -1.0, dtype=torch.float64, device=device)
