"""A fixed-size, mergeable summary of the mismatch between sampler and learner log-probs.

The mismatch of a sampled token is ``d = log π_learner − log μ_sampler``: positive where the learner finds the token
likelier than the sampler did. ``r = exp(d)`` is the importance ratio.

Sources of the formulas:
    verl       ``verl/trainer/ppo/rollout_corr_helper.py``, ``compute_offpolicy_metrics``
    verl debug ``verl/utils/debug/metrics.py``, ``calculate_debug_metrics``
    Schulman   "Approximating KL Divergence" (2020), estimators k1 and k3
    NeMo-RL    ``token_mult_prob_error`` in ``nemo_rl/algorithms``
    DDSketch   Masson, Rim, Lee, "DDSketch" (VLDB 2019), log-spaced bins with bounded relative error
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

STATE_VERSION = 1

BINS_PER_DECADE = 120
DECADES = 12
SMALLEST_MAGNITUDE = 1e-9
BINS_PER_SIGN = BINS_PER_DECADE * DECADES
ZERO_BIN = BINS_PER_SIGN
BIN_COUNT = 2 * BINS_PER_SIGN + 1
BIN_RATIO = 10 ** (1 / BINS_PER_DECADE)
QUANTILE_RELATIVE_ERROR = (BIN_RATIO - 1) / (BIN_RATIO + 1)

EXPONENT_CAP = 88.0
"""Exponents are clamped here, near the end of float32: where verl and NeMo-RL overflow to inf, sums stay finite."""

CONSTANT_SPREAD = 1e-14
"""A variance below this share of the mean square is rounding of a constant; a correlation with it is NaN."""

_QUANTILES = {"abs_p50": 0.5, "abs_p90": 0.9, "abs_p99": 0.99, "abs_p99_9": 0.999}


def _count() -> Any:
    return field(default=0, metadata={"merge": operator.add, "kind": int})


def _sum() -> Any:
    return field(default=0.0, metadata={"merge": operator.add, "kind": float})


def _least() -> Any:
    return field(default=math.inf, metadata={"merge": min, "kind": float})


def _greatest(default: float = 0.0) -> Any:
    return field(default=default, metadata={"merge": max, "kind": float})


def _empty_histogram() -> Tensor:
    return torch.zeros(BIN_COUNT, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class MismatchStats:
    """Counts, float64 sums, extremes and a histogram of ``d`` over sampled tokens.

    Moments are over *finite* tokens: those where both log-probs are finite. Sequence sums ``D = Σ_t d`` are over
    sequences with no non-finite token. Merging is associative and commutative: exact for counts, extremes and the
    histogram, up to float64 rounding for sums.

    ``histogram`` is int64 of shape ``(BIN_COUNT,)`` on the host. Bin ``ZERO_BIN ± k`` holds
    ``1e-9·γ^(k−1) ≤ ±d < 1e-9·γ^k`` with ``γ = 10^(1/120)``; smaller ``|d|`` is in the zero bin, ``|d|`` from 1e3 on in
    the bin at the end.
    """

    tokens: int = _count()
    sequences: int = _count()
    nonfinite_sampler: int = _count()
    nonfinite_learner: int = _count()
    nonfinite_tokens: int = _count()
    nonfinite_sequences: int = _count()

    d_sum: float = _sum()
    d_abs_sum: float = _sum()
    d_square_sum: float = _sum()
    d_min: float = _least()
    d_max: float = _greatest(-math.inf)
    k3_sum: float = _sum()
    expm1_abs_sum: float = _sum()

    sampler_prob_sum: float = _sum()
    learner_prob_sum: float = _sum()
    sampler_prob_square_sum: float = _sum()
    learner_prob_square_sum: float = _sum()
    prob_product_sum: float = _sum()
    prob_abs_sum: float = _sum()
    prob_abs_max: float = _greatest()

    sequence_sum: float = _sum()
    sequence_abs_sum: float = _sum()
    sequence_square_sum: float = _sum()
    sequence_abs_max: float = _greatest()

    histogram: Tensor = field(default_factory=_empty_histogram, metadata={"merge": operator.add})

    @classmethod
    def empty(cls) -> MismatchStats:
        """The summary of no tokens: the neutral element of ``merge``."""
        return cls()

    @classmethod
    @torch.no_grad()
    def from_log_probs(
        cls, sampler: Tensor, learner: Tensor, mask: Tensor, sequence_ids: Tensor | None = None
    ) -> MismatchStats:
        """Summarize one batch on the learner's device, with one copy of 23 KB to the host.

        Args:
            sampler: log μ, shape (sequences, tokens), any real dtype; upcast to float64 before the subtraction.
            learner: log π, same shape.
            mask: same shape, non-zero on sampled tokens. What lies under zeros is ignored, NaN included.
            sequence_ids: integers of the same shape, for rows that hold several sequences, or parts of one; by
                default a row is a sequence. Finding the distinct ids costs one more synchronization.

        A sequence counts if it has a sampled token, and must lie in one call: summaries cannot join its parts.

        Raises:
            ValueError: the shapes differ or are not two-dimensional.
        """
        _require_equal_shapes(sampler=sampler, learner=learner, mask=mask, sequence_ids=sequence_ids)
        if mask.numel() == 0:
            return cls()
        sampler, learner = (side.to(device=learner.device, dtype=torch.float64) for side in (sampler, learner))
        mask = mask.to(device=learner.device, dtype=torch.bool)
        nonfinite_sampler = mask & ~torch.isfinite(sampler)
        nonfinite_learner = mask & ~torch.isfinite(learner)
        nonfinite = nonfinite_sampler | nonfinite_learner
        finite = mask & ~nonfinite
        d = torch.where(finite, learner - sampler, 0.0)
        reductions = {
            "tokens": mask.sum(),
            "nonfinite_sampler": nonfinite_sampler.sum(),
            "nonfinite_learner": nonfinite_learner.sum(),
            "nonfinite_tokens": nonfinite.sum(),
            **_token_reductions(d, finite),
            **_probability_reductions(sampler, learner, finite),
            **_sequence_reductions(d, mask, nonfinite, sequence_ids),
        }
        return cls._from_device(reductions, _histogram(d, finite))

    @classmethod
    def _from_device(cls, reductions: dict[str, Tensor], histogram: Tensor) -> MismatchStats:
        """One host copy for everything: float64 carries counts exactly up to 2^53."""
        scalars = torch.stack([value.to(torch.float64) for value in reductions.values()])
        host = torch.cat([scalars, histogram.to(torch.float64)]).cpu()
        kinds = {item.name: item.metadata["kind"] for item in _scalar_fields()}
        values = {name: kinds[name](value) for name, value in zip(reductions, host.tolist(), strict=False)}
        return cls(**values, histogram=host[len(reductions) :].to(torch.int64))

    def merge(self, other: MismatchStats) -> MismatchStats:
        """The summary of both sets of tokens. Neither operand changes."""
        return type(self)(
            **{
                item.name: item.metadata["merge"](getattr(self, item.name), getattr(other, item.name))
                for item in fields(self)
            }
        )

    __add__ = merge

    @property
    def finite_tokens(self) -> int:
        """Tokens that enter the moments."""
        return self.tokens - self.nonfinite_tokens

    @property
    def finite_sequences(self) -> int:
        """Sequences that enter the sequence sums."""
        return self.sequences - self.nonfinite_sequences

    @property
    def d_abs_max(self) -> float:
        """max |d|; −inf with no finite token."""
        return max(-self.d_min, self.d_max)

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
        folded = self.histogram[ZERO_BIN:].clone()
        folded[1:] += self.histogram[:ZERO_BIN].flip(0)
        return folded

    def pearson(self) -> float:
        """Pearson correlation of exp(sampler) and exp(learner); NaN if either is constant (verl debug)."""
        n = self.finite_tokens
        sampler = _spread(n, self.sampler_prob_sum, self.sampler_prob_square_sum)
        learner = _spread(n, self.learner_prob_sum, self.learner_prob_square_sum)
        if math.isnan(sampler) or math.isnan(learner):
            return math.nan
        covariance = self.prob_product_sum - self.sampler_prob_sum * self.learner_prob_sum / n
        return max(-1.0, min(1.0, covariance / math.sqrt(sampler * learner)))

    def metrics(self, prefix: str = "mismatch/") -> dict[str, float]:
        """The metrics under ``prefix``; with no finite token (or sequence), counts as they are and NaN for the rest.

        Means are over finite tokens, ``p = exp(log-prob)``, ``Δp = p_learner − p_sampler``, ``D = Σ_t d``.

        ======================  ====================================================  =================================
        name                    formula                                               source
        ======================  ====================================================  =================================
        tokens, sequences       sampled tokens; sequences that have one
        mean_abs, max_abs       mean |d|, max |d|                                     TRL sampling_logp_difference
        abs_p50 … abs_p99_9     quantiles of |d|, relative error ≤ 1 %                DDSketch
        k1                      mean(−d), of KL(μ‖π)                                  Schulman; verl rollout_corr/kl
        k3                      mean(r − 1 − d), of KL(μ‖π)                           Schulman; verl rollout_corr/k3_kl
        seq_mean_abs            mean |D| over finite sequences
        seq_max_abs             max |D| over finite sequences
        prob_mean_abs           mean |Δp|                                             verl debug rollout_probs_diff_mean
        prob_max_abs            max |Δp|                                              verl debug rollout_probs_diff_max
        pearson                 corr(p_sampler, p_learner)                            verl debug, arXiv 2506.13585
        token_mult_prob_error   mean exp|d|                                           NeMo-RL
        nonfinite_sampler       tokens where the sampler's log-prob is NaN or ±inf
        nonfinite_learner       tokens where the learner's is
        nonfinite_tokens        tokens where either is
        ======================  ====================================================  =================================

        Exponents are capped at ``EXPONENT_CAP``, in k3, token_mult_prob_error and p alike.
        """
        values: dict[str, float] = {
            "tokens": float(self.tokens),
            "sequences": float(self.sequences),
            "nonfinite_sampler": float(self.nonfinite_sampler),
            "nonfinite_learner": float(self.nonfinite_learner),
            "nonfinite_tokens": float(self.nonfinite_tokens),
            **self._token_metrics(),
            **self._sequence_metrics(),
        }
        return {prefix + name: value for name, value in values.items()}

    def _token_metrics(self) -> dict[str, float]:
        n = self.finite_tokens
        return {
            "mean_abs": _mean(self.d_abs_sum, n),
            "max_abs": self.d_abs_max if n else math.nan,
            **{name: self.abs_quantile(q) for name, q in _QUANTILES.items()},
            "k1": _mean(-self.d_sum, n),
            "k3": _mean(self.k3_sum, n),
            "prob_mean_abs": _mean(self.prob_abs_sum, n),
            "prob_max_abs": self.prob_abs_max if n else math.nan,
            "pearson": self.pearson(),
            "token_mult_prob_error": 1.0 + _mean(self.expm1_abs_sum, n),
        }

    def _sequence_metrics(self) -> dict[str, float]:
        n = self.finite_sequences
        return {
            "seq_mean_abs": _mean(self.sequence_abs_sum, n),
            "seq_max_abs": self.sequence_abs_max if n else math.nan,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able state: ``version``, the fields that are not at their default, and the occupied bins.

        ``histogram`` is ``{"bins": [...], "counts": [...]}``, bins counted from the zero bin, negative for ``d < 0``.
        """
        scalars = {item.name: getattr(self, item.name) for item in _scalar_fields()}
        defaults = {item.name: item.default for item in _scalar_fields()}
        occupied = self.histogram.nonzero().flatten()
        return {
            "version": STATE_VERSION,
            **{name: value for name, value in scalars.items() if value != defaults[name]},
            "histogram": {"bins": (occupied - ZERO_BIN).tolist(), "counts": self.histogram[occupied].tolist()},
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> MismatchStats:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: a version other than ``STATE_VERSION``, a field that this version does not have, a bin outside
                the histogram.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"mismatch state has version {state.get('version')!r}; this release reads {STATE_VERSION}")
        scalars = {name: value for name, value in state.items() if name not in ("version", "histogram")}
        unknown = sorted(scalars.keys() - {item.name for item in _scalar_fields()})
        if unknown:
            raise ValueError(f"mismatch state of version {STATE_VERSION} has unknown fields: {', '.join(unknown)}")
        return cls(**scalars, histogram=_dense_histogram(**state["histogram"]))


def bin_edges() -> Tensor:
    """Edges of the bins of ``|d|`` above the zero bin, float64 of shape ``(BINS_PER_SIGN + 1,)``, from 1e-9 to 1e3."""
    exponents = torch.arange(BINS_PER_SIGN + 1, dtype=torch.float64) / BINS_PER_DECADE
    return SMALLEST_MAGNITUDE * torch.pow(10.0, exponents)


def bin_values() -> Tensor:
    """The value that stands for each bin of ``d``, float64 of shape ``(BIN_COUNT,)``.

    ``2·edge_low·edge_high / (edge_low + edge_high)``, whose relative error is the same, (γ−1)/(γ+1), at both edges.
    """
    edges = bin_edges()
    positive = 2 * edges[:-1] * edges[1:] / (edges[:-1] + edges[1:])
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def _require_equal_shapes(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) != 1 or len(shapes["mask"]) != 2:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"expected equal shapes (sequences, tokens), got {listed}")


def _token_reductions(d: Tensor, finite: Tensor) -> dict[str, Tensor]:
    """Reductions of ``d`` (zero where not finite) that are zero at ``d = 0``, or masked."""
    exponent = d.clamp(max=EXPONENT_CAP)
    return {
        "d_sum": d.sum(),
        "d_abs_sum": d.abs().sum(),
        "d_square_sum": d.square().sum(),
        "d_min": d.masked_fill(~finite, math.inf).amin(),
        "d_max": d.masked_fill(~finite, -math.inf).amax(),
        "k3_sum": (torch.expm1(exponent) - exponent).sum(),
        "expm1_abs_sum": torch.expm1(d.abs().clamp(max=EXPONENT_CAP)).sum(),
    }


def _probability_reductions(sampler: Tensor, learner: Tensor, finite: Tensor) -> dict[str, Tensor]:
    p_sampler, p_learner = (torch.where(finite, side.clamp(max=EXPONENT_CAP).exp(), 0.0) for side in (sampler, learner))
    difference = (p_learner - p_sampler).abs()
    return {
        "sampler_prob_sum": p_sampler.sum(),
        "learner_prob_sum": p_learner.sum(),
        "sampler_prob_square_sum": p_sampler.square().sum(),
        "learner_prob_square_sum": p_learner.square().sum(),
        "prob_product_sum": (p_sampler * p_learner).sum(),
        "prob_abs_sum": difference.sum(),
        "prob_abs_max": difference.amax(),
    }


def _sequence_reductions(d: Tensor, mask: Tensor, nonfinite: Tensor, sequence_ids: Tensor | None) -> dict[str, Tensor]:
    sampled, broken, sums = _sum_by_sequence([mask, nonfinite, d], sequence_ids)
    sums = torch.where(broken > 0, 0.0, sums)
    return {
        "sequences": (sampled > 0).sum(),
        "nonfinite_sequences": (broken > 0).sum(),
        "sequence_sum": sums.sum(),
        "sequence_abs_sum": sums.abs().sum(),
        "sequence_square_sum": sums.square().sum(),
        "sequence_abs_max": sums.abs().amax(),
    }


def _sum_by_sequence(values: list[Tensor], sequence_ids: Tensor | None) -> list[Tensor]:
    if sequence_ids is None:
        return [value.sum(dim=-1, dtype=torch.float64) for value in values]
    distinct, index = torch.unique(sequence_ids.to(values[0].device).flatten(), return_inverse=True)
    zeros = torch.zeros(len(distinct), dtype=torch.float64, device=index.device)
    return [zeros.index_add(0, index, value.flatten().to(torch.float64)) for value in values]


def _histogram(d: Tensor, finite: Tensor) -> Tensor:
    """``index_add`` rather than ``bincount``, which on CUDA stops for the largest index."""
    magnitude = (torch.log10(d.abs() / SMALLEST_MAGNITUDE) * BINS_PER_DECADE).floor() + 1
    bins = ZERO_BIN + d.sign() * magnitude.clamp(0, BINS_PER_SIGN)
    counts = torch.zeros(BIN_COUNT, dtype=torch.int64, device=d.device)
    return counts.index_add(0, bins.flatten().to(torch.int64), finite.flatten().to(torch.int64))


def _bin_quantile(counts: Tensor, values: Tensor, q: float) -> float:
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"a quantile is between 0 and 1, got {q}")
    cumulative = counts.cumsum(0)
    total = int(cumulative[-1])
    if total == 0:
        return math.nan
    rank = math.floor(q * (total - 1))
    return float(values[torch.searchsorted(cumulative, rank, right=True)])


def _dense_histogram(bins: list[int], counts: list[int]) -> Tensor:
    histogram = _empty_histogram()
    if not all(-BINS_PER_SIGN <= index <= BINS_PER_SIGN for index in bins) or len(bins) != len(counts):
        raise ValueError(f"mismatch state has a histogram outside ±{BINS_PER_SIGN} bins, or not one count a bin")
    histogram[torch.tensor(bins, dtype=torch.int64) + ZERO_BIN] = torch.tensor(counts, dtype=torch.int64)
    return histogram


def _scalar_fields() -> list[Any]:
    return [item for item in fields(MismatchStats) if "kind" in item.metadata]


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan


def _spread(count: int, total: float, squares: float) -> float:
    """Σ(x − mean)² from Σx and Σx²; NaN where that is only rounding."""
    if count == 0:
        return math.nan
    spread = squares - total * total / count
    return spread if spread > CONSTANT_SPREAD * squares else math.nan
