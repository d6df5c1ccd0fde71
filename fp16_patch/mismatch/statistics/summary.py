"""Summarizes the mismatch between sampler and learner log-probs, in a fixed size that merges.

The mismatch of a sampled token is ``d = log π_learner − log μ_sampler``: positive where the learner finds the token
likelier than the sampler did. ``r = exp(d)`` is the importance ratio, ``D = Σ_t d`` the sum over a sequence.

Sources of the formulas:
    verl       ``verl/trainer/ppo/rollout_corr_helper.py``, ``compute_offpolicy_metrics`` and ``compute_is_metrics``
    verl debug ``verl/utils/debug/metrics.py``, ``calculate_debug_metrics``
    Schulman   "Approximating KL Divergence" (2020), estimators k1 and k3
    NeMo-RL    ``ClippedPGLossFn`` in ``nemo_rl/algorithms``
    TRL        ``GRPOTrainer``, its ``sampling/`` metrics
    DDSketch   Masson, Rim, Lee, "DDSketch" (VLDB 2019), log-spaced bins with bounded relative error
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics import bands, bins, json_sum, serial
from fp16_patch.mismatch.statistics.aliases import framework_names
from fp16_patch.mismatch.statistics.bands import Band, Edge, LengthBand, WorstToken
from fp16_patch.mismatch.statistics.bins import (
    BIN_COUNT,
    BINS_PER_DECADE,
    BINS_PER_SIGN,
    QUANTILE_RELATIVE_ERROR,
    ZERO_BIN,
    bin_edges,
    bin_values,
)
from fp16_patch.mismatch.statistics.figures import Figures
from fp16_patch.mismatch.statistics.layout import (
    ADDED_PART,
    GREATER_PART,
    LESSER_PART,
    SCALARS,
    SLICES,
    STATE_SIZE,
    WORST_COLUMNS,
    WORST_PART,
    empty_vector,
    table,
)
from fp16_patch.mismatch.statistics.measure import state_of
from fp16_patch.mismatch.statistics.moments import correlation, effective_share, mean, population_std, sample_std, slope
from fp16_patch.mismatch.statistics.ratios import EXPONENT_CAP, RATIO_BOUND, bounded_ratio
from fp16_patch.mismatch.statistics.serial import STATE_VERSION
from fp16_patch.mismatch.statistics.worst import worst_rows

__all__ = [
    "BINS_PER_DECADE",
    "BINS_PER_SIGN",
    "BIN_COUNT",
    "EXPONENT_CAP",
    "QUANTILE_RELATIVE_ERROR",
    "RATIO_BOUND",
    "STATE_SIZE",
    "STATE_VERSION",
    "ZERO_BIN",
    "Band",
    "Edge",
    "LengthBand",
    "MismatchStats",
    "WorstToken",
    "bin_edges",
    "bin_values",
]

MERGED_AT_ONCE = 64
"""States stacked by ``merge_all``: 4 MB of them."""

_QUANTILES = {"abs_p50": 0.5, "abs_p90": 0.9, "abs_p99": 0.99, "abs_p99_9": 0.999}


@dataclass(frozen=True, eq=False)
class MismatchStats(Figures):
    """Counts, float64 sums, extremes, histograms and the worst tokens of a set of sampled tokens.

    Moments are over *finite* tokens: those where both log-probs are finite. Figures of sequences are over those that
    have tokens, none of them non-finite. Merging is associative and commutative: exact for counts, extremes, tables of
    counts and the worst tokens, up to float64 rounding for sums.

    ``vector`` is the state, float64 of shape ``(STATE_SIZE,)`` on the device where it was measured; see
    ``fp16_patch.mismatch.statistics.layout``. Reading any figure copies it to the host, and on an accelerator waits for
    it.
    """

    vector: Tensor

    @classmethod
    def empty(cls) -> MismatchStats:
        """Make the summary of no tokens: the neutral element of ``merge``."""
        return cls(empty_vector())

    @classmethod
    @torch.no_grad()
    def from_log_probs(
        cls,
        sampler: Tensor,
        learner: Tensor,
        mask: Tensor,
        sequence_ids: Tensor | None = None,
        token_ids: Tensor | None = None,
        first_sequence: int = 0,
    ) -> MismatchStats:
        """Summarize one batch on the learner's device, without waiting for it unless ``sequence_ids`` are given.

        Args:
            sampler: log μ, shape (sequences, tokens), any real dtype; upcast to float64 before the subtraction.
            learner: log π, same shape.
            mask: same shape, non-zero on sampled tokens. What lies under zeros is ignored, NaN included.
            sequence_ids: integers of the same shape, for rows that hold several sequences, or parts of one, each in the
                order of its tokens; by default a row is a sequence.
            token_ids: integers of the same shape, for the worst tokens to be named by.
            first_sequence: the number of the first row, for the worst tokens; sequences with ids are named by these.

        A sequence counts if it has a sampled token, and must lie in one call: summaries cannot join its parts.

        Raises:
            ValueError: the shapes differ or are not two-dimensional.
        """
        _require_equal_shapes(
            sampler=sampler, learner=learner, mask=mask, sequence_ids=sequence_ids, token_ids=token_ids
        )
        device = learner.device
        if mask.numel() == 0:
            return cls(empty_vector(device))
        sequence_ids, token_ids = (
            None if ids is None else ids.detach().to(device) for ids in (sequence_ids, token_ids)
        )
        vector = state_of(
            sampler.detach().to(device),
            learner.detach(),
            mask.to(device=device, dtype=torch.bool),
            sequence_ids,
            token_ids,
            first_sequence,
        )
        return cls(vector)

    def to_host(self) -> MismatchStats:
        """Return the same summary in the host's memory: one copy, or this object if it is there."""
        return self if self.vector.device.type == "cpu" else type(self)(self.vector.cpu())

    def merge(self, other: MismatchStats) -> MismatchStats:
        """Return the summary of both sets of tokens, on this one's device. Neither operand changes."""
        return type(self)(_merged(torch.stack([self.vector, other.vector.to(self.vector.device)])))

    __add__ = merge

    @classmethod
    def merge_all(cls, summaries: Iterable[MismatchStats]) -> MismatchStats:
        """Return the summary of all sets of tokens, on the first one's device; of none, the empty one."""
        vectors = (stats.vector for stats in summaries)
        total: Tensor | None = None
        while block := list(islice(vectors, MERGED_AT_ONCE)):
            device = block[0].device if total is None else total.device
            parts = block if total is None else [total, *block]
            total = _merged(torch.stack([part.to(device) for part in parts]))
        return cls.empty() if total is None else cls(total)

    def __reduce__(self) -> tuple[Callable[[bytes], MismatchStats], tuple[bytes]]:
        """Pickle compactly; what is read back is on the host, wherever it was."""
        return type(self).from_bytes, (self.to_bytes(),)

    @cached_property
    def _host(self) -> Tensor:
        return self.vector.cpu()

    @cached_property
    def _scalars(self) -> Mapping[str, float]:
        values = torch.stack([self._host[SLICES[name].start] for name in SCALARS]).tolist()
        return dict(zip(SCALARS, values, strict=True))

    @property
    def histogram(self) -> Tensor:
        """Counts of ``d``, int64 of shape ``(BIN_COUNT,)`` on the host.

        Bin ``ZERO_BIN ± k`` holds ``1e-9·γ^(k−1) ≤ ±d < 1e-9·γ^k`` with ``γ = 10^(1/120)``; smaller ``|d|`` is in the
        zero bin, ``|d|`` from 1e3 on in the bin at the end.
        """
        return table(self._host, "histogram")

    def quantile(self, q: float) -> float:
        """The ``q`` quantile of ``d``: order statistic ⌊q·(n−1)⌋, within 1 % of it; NaN with no finite token.

        As ``torch.quantile(..., interpolation="lower")``. Below 1e-9 it is 0; beyond ±1e3 it is the end bin's value.
        """
        return _bin_quantile(self.histogram, bin_values(), q)

    def abs_quantile(self, q: float) -> float:
        """The ``q`` quantile of ``|d|``, with the bounds of ``quantile``."""
        return _bin_quantile(self.abs_histogram(), bin_values()[ZERO_BIN:], q)

    def abs_histogram(self) -> Tensor:
        """Counts of ``|d|``, int64 of shape ``(BINS_PER_SIGN + 1,)``: the zero bin, then upwards. See ``bin_edges``."""
        histogram = self.histogram
        folded = histogram[ZERO_BIN:].clone()
        folded[1:] += histogram[:ZERO_BIN].flip(0)
        return folded

    def joint_probability(self) -> Tensor:
        """Counts of finite tokens by (sampler's, learner's) probability, int64 (P, P). See ``probability_edges``."""
        return table(self._host, "joint").view(bins.PROBABILITY_BIN_COUNT, -1)

    def length_density(self) -> Tensor:
        """Counts of finite sequences by (length, D), int64 (L, B). See ``length_edges`` and ``sum_edges``."""
        return table(self._host, "density").view(bins.LENGTH_BAND_COUNT, -1)

    probability_edges = staticmethod(bins.probability_edges)
    length_edges = staticmethod(bins.length_edges)
    sum_edges = staticmethod(bins.sum_edges)

    def probability_bands(self) -> list[Band]:
        """``d`` by the sampler's probability of the token; bands without a finite token are left out."""
        return bands.probability_bands(self._host)

    def position_bands(self) -> list[Band]:
        """``d`` by the token's position in its sequence, with bands of their own for its edges, see ``edges``.

        Between them by powers of two; places are counted as in ``WorstToken``. The one token of a sequence is its
        first. Bands without a finite token are left out; the edges but the first have NaN for their limits.
        """
        return bands.position_bands(self._host)

    def edges(self) -> list[Edge]:
        """The edges of the sequences against all other tokens: first and last, and those beside a gap in the mask.

        A gap is places of the sequence that were not sampled, such as a tool's answer. Empty edges are left out, and
        states of versions 1 and 2 have no ``expected_abs_mean``.
        """
        return bands.edges(self._host)

    def by_length(self) -> list[LengthBand]:
        """``D`` by the number of sampled tokens; bands without a finite sequence are left out."""
        return bands.length_bands(self._host)

    def worst_tokens(self) -> list[WorstToken]:
        """The tokens of largest ``|d|``, at most ``WORST_TOKENS``, largest first; non-finite ones are not among them.

        Of equal ones, the lower sequence comes first, then the lower position.
        """
        return bands.worst_tokens(self._host)

    def pearson(self) -> float:
        """Pearson correlation of exp(sampler) and exp(learner); NaN if either is constant (verl debug)."""
        return correlation(
            self.finite_tokens,
            self.sampler_prob_sum,
            self.learner_prob_sum,
            self.sampler_prob_square_sum,
            self.learner_prob_square_sum,
            self.prob_product_sum,
        )

    def log_prob_correlation(self) -> float:
        """Pearson correlation of the log-probs; NaN if either is constant."""
        return correlation(
            self.weighed_tokens,
            self.sampler_log_prob_sum,
            self.learner_log_prob_sum,
            self.sampler_log_prob_square_sum,
            self.learner_log_prob_square_sum,
            self.log_prob_product_sum,
        )

    def log_prob_slope(self) -> float:
        """Slope of the least-squares line of log π on log μ; NaN if log μ is constant."""
        return slope(
            self.weighed_tokens,
            self.sampler_log_prob_sum,
            self.learner_log_prob_sum,
            self.sampler_log_prob_square_sum,
            self.log_prob_product_sum,
        )

    def is_standard_error(self) -> float:
        """Standard error of mean r: √(s²/n) with the unbiased variance s²; NaN with fewer than two tokens."""
        n = self.weighed_tokens
        return sample_std(n, self.expm1_sum, self.expm1_square_sum) / math.sqrt(n) if n else math.nan

    def metrics(self, prefix: str = "mismatch/") -> dict[str, float]:
        """Return the metrics under ``prefix``; NaN for all but counts where there is no finite token (or sequence).

        Means are over finite tokens, ``p = exp(log-prob)``, ``Δp = p_learner − p_sampler``, ``D = Σ_t d``,
        ``R = exp(D)``, n their number.

        ======================  ====================================================  =================================
        name                    formula                                               source
        ======================  ====================================================  =================================
        tokens, sequences       sampled tokens; sequences that have one
        mean_abs, max_abs       mean |d|, max |d|                                     TRL sampling_logp_difference
        abs_p50 … abs_p99_9     quantiles of |d|, relative error ≤ 1 %                DDSketch
        tail_1e_2, _1e_1, _1    share of tokens with |d| above 0.01, 0.1, 1
        k1                      mean(−d), of KL(μ‖π)                                  Schulman; verl rollout_corr/kl
        k3                      mean(r − 1 − d), of KL(μ‖π)                           Schulman; verl rollout_corr/k3_kl
        k3_reverse              mean(1/r − 1 + d), of KL(π‖μ)                         NeMo-RL policy_kl_error
        is_mean, is_std         mean r, its standard deviation
        is_min, is_max          min r, max r
        ess                     (Σ r)² / (n Σ r²)                                     Kish's effective sample size ÷ n
        chi2_token              mean r² − 1                                           verl rollout_corr/chi2_token
        tis_clip_fraction       share of tokens with r > 2                            verl rollout_is, token level
        icepop_mask_fraction    share of tokens with r outside 0.5 … 5                IcePop's bounds
        seq_is_mean, seq_ess    mean R, (Σ R)² / (n Σ R²)
        seq_mask_fraction       share of sequences with R outside 0.5 … 2
        chi2_seq                mean R² − 1                                           verl rollout_corr/chi2_seq
        seq_mean_abs            mean |D| over finite sequences
        seq_max_abs             max |D| over finite sequences
        prob_mean_abs           mean |Δp|                                             verl debug rollout_probs_diff_mean
        prob_max_abs            max |Δp|                                              verl debug rollout_probs_diff_max
        pearson                 corr(p_sampler, p_learner)                            verl debug, arXiv 2506.13585
        log_prob_slope          least squares of log π on log μ
        log_prob_correlation    corr(log μ, log π)
        token_mult_prob_error   mean exp|d|                                           NeMo-RL
        nonfinite_sampler       tokens where the sampler's log-prob is NaN or ±inf
        nonfinite_learner       tokens where the learner's is
        nonfinite_tokens        tokens where either is
        nonfinite_certain       of these, where the sampler's is NaN and the learner's at least log 0.999
        positive_sampler        tokens where the sampler's is above 0.5: no log-prob
        positive_learner        tokens where the learner's is
        ======================  ====================================================  =================================

        Exponents are clamped to ±``RATIO_BOUND`` in r and R of the ``is_``, ``ess``, ``chi2_`` and ``seq_`` metrics, as
        verl does, and to ``EXPONENT_CAP`` in k3, k3_reverse, token_mult_prob_error and p. With a state of version 1
        merged in, what it lacks is over the other tokens alone, ``weighed_tokens`` of them.
        """
        values: dict[str, float] = {
            "tokens": float(self.tokens),
            "sequences": float(self.sequences),
            "nonfinite_sampler": float(self.nonfinite_sampler),
            "nonfinite_learner": float(self.nonfinite_learner),
            "nonfinite_tokens": float(self.nonfinite_tokens),
            "nonfinite_certain": float(self.nonfinite_certain),
            "positive_sampler": float(self.sampler_positive_count),
            "positive_learner": float(self.learner_positive_count),
            **self._token_metrics(),
            **self._weight_metrics(),
            **self._sequence_metrics(),
        }
        return {prefix + name: value for name, value in values.items()}

    def aliases(self) -> dict[str, float]:
        """Return the same figures under the frameworks' own names; see ``fp16_patch.mismatch.statistics.aliases``."""
        return framework_names(self, self.metrics(prefix=""))

    def _token_metrics(self) -> dict[str, float]:
        n = self.finite_tokens
        magnitudes, values = self.abs_histogram(), bin_values()[ZERO_BIN:]
        return {
            "mean_abs": mean(self.d_abs_sum, n),
            "max_abs": self.d_abs_max if n else math.nan,
            **{name: _bin_quantile(magnitudes, values, q) for name, q in _QUANTILES.items()},
            "k1": mean(-self.d_sum, n),
            "k3": mean(self.k3_sum, n),
            "prob_mean_abs": mean(self.prob_abs_sum, n),
            "prob_max_abs": self.prob_abs_max if n else math.nan,
            "pearson": self.pearson(),
            "token_mult_prob_error": 1.0 + mean(self.expm1_abs_sum, n),
        }

    def _weight_metrics(self) -> dict[str, float]:
        n = self.weighed_tokens
        return {
            "tail_1e_2": mean(self.tail_1e_2_count, n),
            "tail_1e_1": mean(self.tail_1e_1_count, n),
            "tail_1": mean(self.tail_1_count, n),
            "k3_reverse": mean(self.k3_reverse_sum, n),
            "is_mean": 1.0 + mean(self.expm1_sum, n),
            "is_std": population_std(n, self.expm1_sum, self.expm1_square_sum),
            "is_min": bounded_ratio(self.d_min) if self.finite_tokens else math.nan,
            "is_max": bounded_ratio(self.d_max) if self.finite_tokens else math.nan,
            "ess": effective_share(n, self.expm1_sum, self.expm1_square_sum),
            "chi2_token": mean(2 * self.expm1_sum + self.expm1_square_sum, n),
            "tis_clip_fraction": mean(self.ratio_above_2_count, n),
            "icepop_mask_fraction": mean(self.ratio_below_half_count + self.ratio_above_5_count, n),
            "log_prob_slope": self.log_prob_slope(),
            "log_prob_correlation": self.log_prob_correlation(),
        }

    def _sequence_metrics(self) -> dict[str, float]:
        n, weighed = self.finite_sequences, self.weighed_sequences
        return {
            "seq_mean_abs": mean(self.sequence_abs_sum, n),
            "seq_max_abs": self.sequence_abs_max if n else math.nan,
            "seq_is_mean": 1.0 + mean(self.sequence_expm1_sum, weighed),
            "seq_ess": effective_share(weighed, self.sequence_expm1_sum, self.sequence_expm1_square_sum),
            "seq_mask_fraction": mean(self.sequence_ratio_outside_count, weighed),
            "chi2_seq": mean(2 * self.sequence_expm1_sum + self.sequence_expm1_square_sum, weighed),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the state for JSON: ``version``, and what is not as in the empty summary.

        Scalars by name. ``histogram`` is ``{"bins": [...], "counts": [...]}``, bins counted from the zero bin, negative
        for ``d < 0``; the other tables are ``{"cells": [...], "values": [...]}``. ``worst`` is a list of rows: sampler,
        learner, sequence, position, token_id.
        """
        return serial.as_dict(self._host)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> MismatchStats:
        """Read what ``to_dict`` wrote; of versions 1 and 2 too, whose missing parts are empty.

        Raises:
            ValueError: a version that is not read, a field that this version does not have, a table with
                cells that it does not have.
        """
        return cls(serial.of_dict(state))

    @classmethod
    def sum_of_dicts(cls, states: Sequence[dict[str, Any]]) -> MismatchStats:
        """Return the summary of all sets of tokens, at least one, of what ``to_dict`` wrote of each.

        Raises:
            ValueError: one of them cannot be read; ``from_dict`` says which, and why.
        """
        return cls(json_sum.sum_of_dicts(states))

    def to_bytes(self) -> bytes:
        """Return the state for a message: a magic, the version, and the vector compressed by zlib, a few KB."""
        return serial.as_bytes(self._host)

    @classmethod
    def from_bytes(cls, message: bytes) -> MismatchStats:
        """Read what ``to_bytes`` wrote, on the host.

        Raises:
            ValueError: not a message of ``to_bytes``, another version, or a damaged one.
        """
        return cls(serial.of_bytes(message))


def _require_equal_shapes(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) != 1 or len(shapes["mask"]) != 2:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"expected equal shapes (sequences, tokens), got {listed}")


def _merged(vectors: Tensor) -> Tensor:
    """One state vector of many, (n, STATE_SIZE)."""
    worst = vectors[:, WORST_PART].reshape(-1, len(WORST_COLUMNS))
    return torch.cat(
        [
            vectors[:, ADDED_PART].sum(0),
            vectors[:, LESSER_PART].amin(0),
            vectors[:, GREATER_PART].amax(0),
            worst_rows(worst).flatten(),
        ]
    )


def _bin_quantile(counts: Tensor, values: Tensor, q: float) -> float:
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"a quantile is between 0 and 1, got {q}")
    cumulative = counts.cumsum(0)
    total = int(cumulative[-1])
    if total == 0:
        return math.nan
    rank = math.floor(q * (total - 1))
    return float(values[torch.searchsorted(cumulative, rank, right=True)])
