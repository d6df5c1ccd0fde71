"""Finds the tokens with the largest ``|d|``.

Ties are broken by everything that is kept of a token, so that the order is total and merging is associative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.layout import WORST_TOKENS

SORTED_AT_ONCE = 2048
"""So few values are sorted faster than looked through."""


def largest(magnitude: Tensor, count: int = WORST_TOKENS) -> Tensor:
    """Return the indices of the ``count`` largest of a flat tensor, largest first, of equal ones the earlier first.

    In two stages, of which each sorts about √n values: a value among the largest is in one of the ``count`` blocks
    whose maxima are the largest. No synchronization. Fewer indices if there are fewer values.
    """
    if magnitude.numel() <= SORTED_AT_ONCE:
        return _descending(magnitude)[:count]
    width = math.isqrt(magnitude.numel() // count)
    in_blocks = magnitude.numel() // width * width
    places = torch.arange(magnitude.numel(), device=magnitude.device)
    chosen = _descending(magnitude[:in_blocks].view(-1, width).amax(1))[:count].sort().values
    # What is left over after the last block is looked at as it is.
    candidates = torch.cat([places[:in_blocks].view(-1, width)[chosen].flatten(), places[in_blocks:]])
    return candidates[_descending(magnitude[candidates])[:count]]


def _descending(values: Tensor) -> Tensor:
    return values.sort(descending=True, stable=True).indices


def worst_rows(rows: Tensor) -> Tensor:
    """Return the first ``WORST_TOKENS`` rows by descending magnitude, then by sequence, position and the other columns.

    Args:
        rows: float64 of shape (n, columns), n at least ``WORST_TOKENS``; columns as in ``WORST_COLUMNS``.
    """
    magnitude, sampler, learner, sequence, position, token_id = rows.unbind(1)
    order = torch.arange(len(rows), device=rows.device)
    for key in (learner, sampler, token_id, position, sequence, -magnitude):
        order = order[key[order].argsort(stable=True)]
    return rows[order[:WORST_TOKENS]]
