"""Sampler against learner, pair of dtypes by pair: the figures, with intervals by resampling whole sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.probe.sequences import Sampled, aligned

LOW_LOG_PROB = -3.0
RESAMPLED = 1000
INTERVAL = (0.025, 0.975)
SHOWN = ("mean_abs", "max_abs", "seq_mean_abs", "seq_max_abs", "k1", "k3", "abs_p50", "abs_p90", "abs_p99", "abs_p99_9")
COUNTED = ("tokens", "sequences", "nonfinite_sampler", "nonfinite_learner")


@dataclass(frozen=True, eq=False)
class Pair:
    """Compares one learner's dtype with one sampler's.

    Attributes:
        d: log π − log μ, (sequences, longest response), float64; what is not finite is left out of every mean.
        mask: which of ``d`` are tokens, same shape.
        sampler: log μ, same shape.
    """

    d: Tensor
    mask: Tensor
    sampler: Tensor
    stats: MismatchStats

    @classmethod
    def of(cls, sequences: Sequence[Sampled], scores: Sequence[Sequence[float]]) -> Pair:
        sampler, learner, mask = aligned(sequences, scores)
        tokens = torch.full_like(mask, -1, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence.response)] = torch.tensor(sequence.response)
        stats = MismatchStats.from_log_probs(sampler, learner, mask, token_ids=tokens)
        return cls(learner - sampler, mask, sampler, stats)

    @cached_property
    def _finite(self) -> Tensor:
        return self.mask & self.d.isfinite()

    def figures(self, seed: int) -> dict[str, Any]:
        """Return `SHOWN` and `COUNTED` of `MismatchStats.metrics`, 95 % intervals of two, the unlikely tokens apart."""
        metrics = self.stats.metrics(prefix="")
        low = self._finite & (self.sampler < LOW_LOG_PROB)
        return {
            **{name: metrics[name] for name in SHOWN},
            **{name: int(metrics[name]) for name in COUNTED},
            "mean_abs_interval": _interval(self.resampled_mean_abs(seed)),
            "seq_mean_abs_interval": _interval(self._resampled_sums(seed)),
            "low_probability": {
                "below": LOW_LOG_PROB,
                "tokens": int(low.sum()),
                "mean_abs": float(self.d[low].abs().mean()) if low.any() else math.nan,
            },
        }

    def resampled_mean_abs(self, seed: int) -> Tensor:
        """Return mean |d| over tokens of each of ``RESAMPLED`` draws of sequences with replacement, (RESAMPLED,)."""
        sums = self.d.where(self._finite, 0.0).abs().sum(1)
        counts = self._finite.sum(1).double()
        drawn = _draws(len(sums), seed)
        return sums[drawn].sum(1) / counts[drawn].sum(1)

    def _resampled_sums(self, seed: int) -> Tensor:
        whole = (self._finite == self.mask).all(1) & self.mask.any(1)
        sums = self.d.where(self._finite, 0.0).sum(1).abs()[whole]
        return sums[_draws(len(sums), seed)].mean(1) if len(sums) else torch.full((1,), math.nan)


def ratio(over: Pair, under: Pair, seed: int) -> dict[str, Any]:
    """Divide mean |d| of one pair by that of the other, with its 95 % interval; the two draw their sequences apart."""
    values = (over.stats.metrics(prefix="")["mean_abs"], under.stats.metrics(prefix="")["mean_abs"])
    resampled = over.resampled_mean_abs(seed) / under.resampled_mean_abs(seed + 1)
    return {"ratio": values[0] / values[1] if values[1] else math.nan, "interval": _interval(resampled)}


def _draws(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(max(size, 1), (RESAMPLED, size), generator=generator)


def _interval(values: Tensor) -> list[float]:
    finite = values[values.isfinite()]
    if not len(finite):
        return [math.nan, math.nan]
    return [float(torch.quantile(finite, q)) for q in INTERVAL]
