"""What sums over each sequence come to: D, perplexities, weights, by length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.bins import LENGTH_BAND_COUNT, SUM_BIN_COUNT, length_band, sum_bin
from fp16_patch.mismatch.statistics.layout import SEQUENCE_COUNTS, SEQUENCE_SUMS
from fp16_patch.mismatch.statistics.ratios import EXPONENT_CAP, RATIO_BOUND, TRUNCATION, Ratios
from fp16_patch.mismatch.statistics.tokens import Tokens


class SequenceFigures:
    """Figures of S sequences. All but the counts are of *usable* ones: they have tokens, none of them non-finite.

    Args:
        rows: float64 (8, S), of ``rows``.
    """

    def __init__(self, rows: Tensor) -> None:
        self._length, *self._nonfinite = rows[:4].unbind()
        self._usable = (self._length > 0) & (self._nonfinite[2] == 0)
        sums = torch.where(self._usable, rows[4:], 0.0)
        self._sum = sums[0]
        self._magnitude = self._sum.abs()
        means = sums / self._length.clamp(min=1)
        self._mean_d, self._mean_sampler, self._mean_excess, self._mean_truncated = means.unbind()

    @staticmethod
    def rows(tokens: Tokens, ratios: Ratios) -> Tensor:
        """Of each sequence: its length, non-finite tokens by side and of either, sums of d, log μ, r − 1, w − 1."""
        sums = [tokens.by_sequence(value) for value in (tokens.d, tokens.sampler, ratios.excess)]
        same = ratios.truncated is ratios.excess
        sums.append(sums[-1] if same else tokens.by_sequence(ratios.truncated))
        return torch.cat([tokens.lengths[None].double(), tokens.nonfinite.double(), torch.stack(sums)])

    def sums(self) -> Tensor:
        """In the order of ``layout.SEQUENCE_COUNTS`` and ``SEQUENCE_SUMS``."""
        figures = self._counts() | self._of_sums() | self._of_perplexities()
        return torch.stack([figures[name] for name in (*SEQUENCE_COUNTS, *SEQUENCE_SUMS)]).sum(1)

    def least(self) -> Tensor:
        """The least log-perplexity difference, and mean weight less one; ∞ without a usable sequence."""
        return torch.where(self._usable, self._extreme_rows(), math.inf).amin(1)

    def greatest(self) -> Tensor:
        """The greatest of what ``least`` has the least of."""
        return torch.where(self._usable, self._extreme_rows(), -math.inf).amax(1)

    def magnitudes(self) -> Tensor:
        """max |D|, (1,)."""
        return self._magnitude.amax().unsqueeze(0)

    def tables(self) -> dict[str, Tensor]:
        band = length_band(self._length)
        ones = self._usable.double()
        values = torch.stack([ones, self._sum, self._magnitude, self._sum.square()])
        added = values.new_zeros(len(values), LENGTH_BAND_COUNT).scatter_add_(1, band.expand_as(values), values)
        names = ("length_sequences", "length_sum", "length_abs_sum", "length_square_sum")
        density = values.new_zeros(LENGTH_BAND_COUNT * SUM_BIN_COUNT)
        return {
            **dict(zip(names, added, strict=True)),
            "length_abs_max": values.new_zeros(LENGTH_BAND_COUNT).scatter_reduce_(0, band, self._magnitude, "amax"),
            "density": density.scatter_add_(0, band * SUM_BIN_COUNT + sum_bin(self._sum), ones),
        }

    def _extreme_rows(self) -> Tensor:
        return torch.stack([-self._mean_d, self._mean_truncated])

    def _counts(self) -> dict[str, Tensor]:
        nonfinite_sampler, nonfinite_learner, nonfinite = self._nonfinite
        return {
            "tokens": self._length,
            "sequences": self._length > 0,
            "nonfinite_sampler": nonfinite_sampler,
            "nonfinite_learner": nonfinite_learner,
            "nonfinite_tokens": nonfinite,
            "nonfinite_sequences": nonfinite > 0,
            "weighed_tokens": self._length - nonfinite,
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
        """verl's: exp(−mean log-prob), and how much greater the learner's is."""
        mean_learner = self._mean_sampler + self._mean_d

        def perplexity(mean: Tensor) -> Tensor:
            return (-mean).clamp_(max=EXPONENT_CAP).exp_().mul_(self._usable)

        return {
            "sampler_log_ppl_sum": -self._mean_sampler,
            "learner_log_ppl_sum": -mean_learner,
            "sampler_ppl_sum": perplexity(self._mean_sampler),
            "learner_ppl_sum": perplexity(mean_learner),
            "log_ppl_diff_sum": -self._mean_d,
            "log_ppl_diff_abs_sum": self._mean_d.abs(),
            "ppl_ratio_expm1_sum": torch.expm1((-self._mean_d).clamp_(max=EXPONENT_CAP)),
        }
