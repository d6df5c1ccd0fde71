"""Computes what sums over each sequence come to: D, perplexities, weights, by length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.bins import LENGTH_BAND_COUNT, SUM_BIN_COUNT, length_band, sum_bin
from fp16_patch.mismatch.statistics.layout import SEQUENCE_COUNTS, SEQUENCE_SUMS, TOKENS_OF_SEQUENCES
from fp16_patch.mismatch.statistics.ratios import EXPONENT_CAP, RATIO_BOUND, TRUNCATION, Ratios
from fp16_patch.mismatch.statistics.tokens import Tokens


class SequenceFigures:
    """Figures of S sequences. All but the counts are of *usable* ones: they have tokens, none of them non-finite.

    Args:
        rows: float64 (9, S), of ``rows``.
    """

    def __init__(self, rows: Tensor) -> None:
        self._length, *self._nonfinite = rows[:5].unbind()
        self._usable = (self._length > 0) & (self._nonfinite[2] == 0)
        sums = torch.where(self._usable, rows[5:], 0.0)
        self._sum = sums[0]
        self._magnitude = self._sum.abs()
        self._ones = self._usable.double()
        self._band = length_band(self._length)
        means = sums / self._length.clamp(min=1)
        self._mean_excess, self._mean_truncated = means[2:].unbind()
        # Of perplexities: how much greater the learner's is, and the sampler's.
        self._log_ratio, self._log_sampler = means[:2].neg().unbind()

    @staticmethod
    def rows(tokens: Tokens, ratios: Ratios) -> Tensor:
        """Sum up each sequence: length, the four counts of non-finite tokens, sums of d, log μ, r − 1, w − 1."""
        sums = [tokens.by_sequence(value) for value in (tokens.d, tokens.sampler, ratios.excess)]
        same = ratios.truncated is ratios.excess
        sums.append(sums[-1] if same else tokens.by_sequence(ratios.truncated))
        return torch.cat([tokens.lengths[None].double(), tokens.nonfinite.double(), torch.stack(sums)])

    def sums(self) -> Tensor:
        """Return the sums as in ``layout``: ``TOKENS_OF_SEQUENCES``, ``SEQUENCE_SUMS``, ``SEQUENCE_COUNTS``."""
        figures = self._tokens() | self._of_sums() | self._of_perplexities()
        counted = self._counted()
        # Apart, because converting rows one by one costs more than all the rest.
        return torch.cat(
            [
                torch.stack([figures[name] for name in (*TOKENS_OF_SEQUENCES, *SEQUENCE_SUMS)]).sum(1),
                torch.stack([counted[name] for name in SEQUENCE_COUNTS]).sum(1, dtype=torch.float64),
            ]
        )

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Return the least and greatest log-perplexity difference and mean weight less one, (2,) each; or ±∞."""
        rows = torch.stack([self._log_ratio, self._mean_truncated])
        least, greatest = (torch.where(self._usable, rows, end) for end in (math.inf, -math.inf))
        return least.amin(1), greatest.amax(1)

    def greatest_magnitude(self) -> Tensor:
        """Return max |D|, (1,)."""
        return self._magnitude.amax(0, keepdim=True)

    def by_length(self) -> tuple[Tensor, Tensor]:
        """Return sequences, ΣD, Σ|D|, ΣD² of each band of lengths, (4, L), and the greatest |D|, (L,)."""
        values = torch.stack([self._ones, self._sum, self._magnitude, self._sum.square()])
        added = values.new_zeros(len(values), LENGTH_BAND_COUNT).scatter_add_(1, self._band.expand_as(values), values)
        greatest = values.new_zeros(LENGTH_BAND_COUNT).scatter_reduce_(0, self._band, self._magnitude, "amax")
        return added, greatest

    def density(self) -> Tensor:
        """Count sequences by (length, D), flat."""
        cell = self._band * SUM_BIN_COUNT + sum_bin(self._sum)
        return self._sum.new_zeros(LENGTH_BAND_COUNT * SUM_BIN_COUNT).scatter_add_(0, cell, self._ones)

    def _tokens(self) -> dict[str, Tensor]:
        nonfinite_sampler, nonfinite_learner, nonfinite, certain = self._nonfinite
        return {
            "tokens": self._length,
            "nonfinite_sampler": nonfinite_sampler,
            "nonfinite_learner": nonfinite_learner,
            "nonfinite_tokens": nonfinite,
            "nonfinite_certain": certain,
            "weighed_tokens": self._length - nonfinite,
        }

    def _counted(self) -> dict[str, Tensor]:
        """Return which sequences are counted, bool (S,)."""
        return {
            "sequences": self._length > 0,
            "nonfinite_sequences": self._nonfinite[2] > 0,
            "weighed_sequences": self._usable,
            "sequence_ratio_outside_count": self._magnitude > math.log(TRUNCATION),
            "sequence_weight_above_2_count": self._mean_excess > TRUNCATION - 1.0,
            "sequence_weight_below_half_count": self._mean_excess < 1.0 / TRUNCATION - 1.0,
        }

    def _of_sums(self) -> dict[str, Tensor]:
        excess = torch.expm1(self._sum.clamp(-RATIO_BOUND, RATIO_BOUND))
        return {
            "sequence_sum": self._sum,
            "sequence_abs_sum": self._magnitude,
            "sequence_square_sum": self._sum.square(),
            "sequence_expm1_sum": excess,
            "sequence_expm1_square_sum": excess.square(),
            "sequence_weight_sum": self._mean_truncated,
            "sequence_weight_square_sum": self._mean_truncated.square(),
        }

    def _of_perplexities(self) -> dict[str, Tensor]:
        """Return the figures of verl's perplexities, exp(−mean log-prob), and of how much greater the learner's is."""
        log_learner = self._log_sampler + self._log_ratio
        both = torch.stack([self._log_sampler, log_learner])
        sampler, learner = both.clamp_(max=EXPONENT_CAP).exp_().mul_(self._ones).unbind()
        return {
            "sampler_log_ppl_sum": self._log_sampler,
            "learner_log_ppl_sum": log_learner,
            "sampler_ppl_sum": sampler,
            "learner_ppl_sum": learner,
            "log_ppl_diff_sum": self._log_ratio,
            "log_ppl_diff_abs_sum": self._log_ratio.abs(),
            "ppl_ratio_expm1_sum": torch.expm1(self._log_ratio.clamp(max=EXPONENT_CAP)),
        }
