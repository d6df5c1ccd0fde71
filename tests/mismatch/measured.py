"""Statistics of a known difference, for tests of what becomes of them."""

from __future__ import annotations

from functools import cache

import torch

from fp16_patch.mismatch.collection.part import Message, Part
from fp16_patch.mismatch.statistics.summary import MismatchStats


def measured(tokens: int, difference: float = 0.5) -> MismatchStats:
    """One sequence of so many tokens, in which the learner's log-probs are higher by ``difference``."""
    sampler = torch.full((1, tokens), -1.0)
    return MismatchStats.from_log_probs(sampler, sampler + difference, torch.ones(1, tokens))


@cache
def message(rank: int, tokens: int = 4, world_size: int = 2, dropped: int = 0) -> Message:
    return Part(measured(tokens), None, frozenset([rank]), world_size, dropped).pack()
