"""Computes once, from the summaries of a run, the figures that a diagnosis rests on.

Identities used, for tokens x sampled from μ, both sides normalized, ``d = log π − log μ`` and ``r = exp(d)``:
    E[r] = 1            whatever the two differ in: rounding, temperature, weights. It fails where the log-probs are not
                        those of the distribution that was sampled from.
    E[tanh(d/2)] ≤ 0    the same with bounded terms: it is −½ E[(r − 1)²/(r + 1)]. Where x was sampled from π instead it
                        is, by symmetry, ≥ 0.
    d = a·(log μ + H)   to first order, for temperatures T_s of the sampler and T_l of the learner, with a = T_s/T_l − 1
                        and H the entropy in the token's context. So Cov(d, log μ) = a·W and Var(d) = a²·W, W the mean
                        variance within a context, and a = Var(d)/Cov(d, log μ). The slope of log π on log μ, which is
                        1 + a·W/Var(log μ), is too near 1, for contexts differ in H.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp16_patch.mismatch.diagnosis.alerts import Alerts
from fp16_patch.mismatch.diagnosis.judgement import RULE, Thresholds, too_large
from fp16_patch.mismatch.record.states import worst_of
from fp16_patch.mismatch.statistics.summary import Band, Edge, MismatchStats, WorstToken, bin_values

Roles = Mapping[str, Mapping[str, list[str]]]

LARGE_D = 0.5
"""Ratios of tokens with d above this make a mean of ratios uncertain beyond its standard error."""

EARLY_STEPS = 10
"""Stale weights show within so many steps after the first update."""

LATER_STEPS = 3
BAND_TOKENS = 20

SPIKES_SHARE, SPIKES_FACTOR = 0.01, 10.0
"""Spikes are at most this share of the tokens, each so many times beyond the 99 % quantile of |d|, and ``LARGE_D``."""

BURST_FACTOR, BURST_SURE = 3.0, 5.0
"""A step of a burst has so many times the gap that the later steps' tokens have at its probabilities, surely."""

SETTLED_STEPS = 3
SPAN_STEPS = 3 * EARLY_STEPS
"""A gap that changes over a whole training says nothing of its start: so many steps are compared."""
STEP_TOKENS = 50
"""A step with fewer finite tokens says nothing by itself."""

LEARNER_QUANTITIES = ("autocast", "parameter", "activation")
SAMPLER_QUANTITIES = ("engine_weight", "wire", "activation", "module_output", "kv_cache")
_MANTISSA_BITS = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
_QUANTIZED_BITS = 3


@dataclass(frozen=True)
class Moments:
    """Figures of ``d`` over a set of tokens; NaN where there are too few, or the state is too old to have them.

    Attributes:
        mean_abs, mean, std: of d, nats.
        ratio_excess: mean r − 1; ``ratio_z``: the same over its standard error.
        large_ratios: the part of mean r from tokens with d above ``LARGE_D``.
        lean: mean tanh(d/2); ``lean_z``: the same over its standard error.
        positive_share: the share of Σ|d| that is from d > 0.
        slope: of the least-squares line of log π on log μ; ``slope_z``: slope − 1 over its standard error.
        correlation: Pearson's correlation of log π and log μ.
        follows: Pearson's correlation of d and log μ.
        exponent: Var(d)/Cov(d, log μ), the a of the module's docstring.
    """

    tokens: int
    mean_abs: float
    mean: float
    std: float
    ratio_excess: float
    ratio_z: float
    large_ratios: float
    lean: float
    lean_z: float
    positive_share: float
    slope: float
    slope_z: float
    correlation: float
    follows: float
    exponent: float

    @classmethod
    def of(cls, stats: MismatchStats) -> Moments:
        n = stats.finite_tokens
        mean, variance = _mean_and_variance(n, stats.d_sum, stats.d_square_sum)
        std = math.sqrt(variance)
        excess = _quotient(stats.expm1_sum, stats.weighed_tokens)
        lean, lean_error = _expected(stats.histogram, lambda d: torch.tanh(d / 2))
        spread = _mean_and_variance(
            stats.weighed_tokens, stats.sampler_log_prob_sum, stats.sampler_log_prob_square_sum
        )[1]
        slope = stats.log_prob_slope()
        covariance = (slope - 1) * spread
        follows = _quotient(covariance, std * math.sqrt(spread))
        slope_error = math.sqrt(max(0.0, 1 - follows**2) * _quotient(variance, spread * n))
        return cls(
            tokens=n,
            mean_abs=_quotient(stats.d_abs_sum, n),
            mean=mean,
            std=std,
            ratio_excess=excess,
            ratio_z=_quotient(excess, stats.is_standard_error()),
            large_ratios=_expected(stats.histogram, lambda d: torch.where(d > LARGE_D, d.clamp(max=20.0).exp(), 0.0))[
                0
            ],
            lean=lean,
            lean_z=_quotient(lean, lean_error),
            positive_share=_quotient(stats.d_abs_sum + stats.d_sum, 2 * stats.d_abs_sum),
            slope=slope,
            slope_z=_quotient(slope - 1, slope_error),
            correlation=stats.log_prob_correlation(),
            follows=follows,
            exponent=_quotient(variance, covariance),
        )


@dataclass(frozen=True)
class Growth:
    """Mean |d| soon after the first updates against the first step, before which there was none.

    Attributes:
        first, second: mean |d| of the first two steps.
        later: mean |d| of the last of the first ``EARLY_STEPS`` after them, ``last_step`` being the last one.
        expected: mean |d| of the first step, or what it were at the probabilities of the later tokens if that is more:
            a distribution that has become flatter has more rounding.
        z: later − expected over its standard error.
    """

    first_step: int
    first: float
    second: float
    last_step: int
    later: float
    expected: float
    z: float

    @property
    def factor(self) -> float:
        """later ÷ expected; infinite where both sides agreed exactly at first."""
        return self.later / self.expected if self.expected else math.inf if self.later else math.nan


@dataclass(frozen=True)
class Spikes:
    """Few tokens that are far off, and what the figures are without them.

    Attributes:
        tokens: how many have |d| above ``limit``, nats; at most ``SPIKES_SHARE`` of all.
        gap_share: their share of Σ|d|.
        rest_mean_abs: mean |d| of the others; ``rest``: the others' metrics, by the names of ``MismatchStats.metrics``,
            from the histogram; of max |Δp| its bound.
        worst: (step, token), largest |d| first.
    """

    tokens: int
    limit: float
    gap_share: float
    rest_mean_abs: float
    rest: Mapping[str, float]
    worst: tuple[tuple[int, WorstToken], ...]

    @classmethod
    def of(cls, steps: Mapping[int, MismatchStats], stats: MismatchStats) -> Spikes | None:
        limit = max(LARGE_D, SPIKES_FACTOR * stats.abs_quantile(0.99)) if stats.finite_tokens else math.inf
        counts, values = stats.histogram.double(), bin_values()
        far = values.abs() > limit
        tokens = int(counts[far].sum())
        if not 0 < tokens <= SPIKES_SHARE * stats.finite_tokens:
            return None
        gap = counts * values.abs()
        others = counts.where(~far, 0.0)
        worst = worst_of((step, token) for step, of_step in steps.items() for token in of_step.worst_tokens())
        return cls(
            tokens=tokens,
            limit=limit,
            gap_share=_quotient(float(gap[far].sum()), float(gap.sum())),
            rest_mean_abs=_quotient(float(gap[~far].sum()), float(others.sum())),
            rest=_metrics_of(others, values, limit),
            worst=tuple(pair for pair in worst if abs(pair[1].d) > limit),
        )


def _metrics_of(counts: Tensor, values: Tensor, limit: float) -> dict[str, float]:
    """Return the figures that are judged, of so many tokens with each d, none beyond ``limit``."""
    n = float(counts.sum())
    ratios = values.clamp(-20.0, 20.0).exp()
    ratio_sum, square_sum = float(counts @ ratios), float(counts @ ratios.square())
    return {
        "mismatch/k1": -float(counts @ values) / n,
        "mismatch/is_mean": ratio_sum / n,
        "mismatch/ess": ratio_sum**2 / (n * square_sum),
        "mismatch/chi2_token": square_sum / n - 1,
        "mismatch/token_mult_prob_error": float(counts @ values.abs().clamp(max=20.0).exp()) / n,
        "mismatch/prob_max_abs": 1 - math.exp(-limit),
    }


@dataclass(frozen=True)
class Burst:
    """Steps after a start of the trainer at which the gap was larger than it has been since.

    Attributes:
        means: step → mean |d|.
        settled: mean |d| of the steps that followed, from ``next_step`` on.
    """

    means: Mapping[int, float]
    next_step: int
    settled: float


@dataclass(frozen=True)
class Side:
    """The coarsest dtype one side was seen in, and for which quantities."""

    role: str
    dtype: str
    quantities: tuple[str, ...]

    @property
    def bits(self) -> int:
        return mantissa_bits(self.dtype) or 0


@dataclass(frozen=True)
class Evidence:
    """One run's figures.

    Attributes:
        total: over all steps. ``start``: over the first step, if the record has the first step of training.
        growth: None without the first step of training, or without a step after it.
        long_growth: mean |d| of the last steps over that of the first, in a record of many steps; else None.
        padding: the sampler's log-prob that most of the tokens far off share, if they do.
        spikes: few tokens that are far off; None if there are none, or more than few.
        thresholds: what is too large in this run. ``too_large``: which figures are, over all tokens or at some steps.
        floor_multiple: mean |d| over that of the learner against itself; None where that was not measured.
    """

    stats: MismatchStats
    total: Moments
    start: Moments | None
    steps: tuple[int, ...]
    growth: Growth | None
    long_growth: float | None
    edges: tuple[Edge, ...]
    padding: float | None
    spikes: Spikes | None
    thresholds: Thresholds
    too_large: tuple[str, ...]
    bands: tuple[Band, ...]
    learner: Side | None
    sampler: Side | None
    planned: str | None
    sampled_by: str
    floor_multiple: float | None

    @classmethod
    def of(
        cls,
        steps: Mapping[int, MismatchStats],
        ledger: Roles | None,
        plan: Mapping[str, Any] | None,
        noise_floor: MismatchStats | None,
    ) -> Evidence:
        measured = measured_steps(steps)
        stats = MismatchStats.merge_all(steps.values())
        total = Moments.of(stats)
        starts = bool(measured) and min(measured) <= 1
        thresholds = Thresholds.of_plan(plan or {})
        floor = _quotient(noise_floor.d_abs_sum, noise_floor.finite_tokens) if noise_floor is not None else math.nan
        return cls(
            stats=stats,
            total=total,
            start=Moments.of(measured[min(measured)]) if starts else None,
            steps=tuple(sorted(steps)),
            growth=_growth(measured) if starts else None,
            long_growth=_long_growth(measured),
            edges=tuple(stats.edges()),
            padding=_shared_padding(stats),
            spikes=Spikes.of(steps, stats),
            thresholds=thresholds,
            too_large=_too_large(steps, stats, thresholds),
            bands=tuple(stats.probability_bands()),
            learner=_side(ledger or {}, "actor", LEARNER_QUANTITIES),
            sampler=_side(ledger or {}, "rollout", SAMPLER_QUANTITIES),
            planned=(plan or {}).get("dtype"),
            sampled_by=str((plan or {}).get("sampler")),
            floor_multiple=_quotient(total.mean_abs, floor) if floor > 0 else None,
        )


def mantissa_bits(dtype: str) -> int | None:
    """Return a dtype's explicit bits of the significand: of quantized ones, float8_e4m3's; None if it is not known."""
    if dtype.startswith(("float8", "fp8", "int", "uint", "float4")):
        return _QUANTIZED_BITS
    return _MANTISSA_BITS.get(dtype)


def measured_steps(steps: Mapping[int, MismatchStats]) -> dict[int, MismatchStats]:
    """Return the steps that say something by themselves, in their order."""
    return {step: steps[step] for step in sorted(steps) if steps[step].finite_tokens >= STEP_TOKENS}


def bursts_of(steps: Mapping[int, MismatchStats], starts: Iterable[int]) -> list[Burst]:
    """Find the bursts after these starts of the trainer, each the first step that it wrote."""
    measured = measured_steps(steps)
    firsts = sorted({min(measured, default=0), *starts})
    spans = zip(firsts, [*firsts[1:], math.inf], strict=True)
    bursts = (_burst({step: measured[step] for step in measured if low <= step < high}) for low, high in spans)
    return [burst for burst in bursts if burst is not None]


def _burst(measured: Mapping[int, MismatchStats]) -> Burst | None:
    """Return the first steps of a trainer if the gap is far larger there than afterwards, and stays small then."""
    steps = list(measured)[:SPAN_STEPS]
    settled = MismatchStats.merge_all(measured[step] for step in steps[len(steps) // 2 :])
    large = [step for step in steps if _is_far_larger(measured[step], settled)]
    count = len(large)
    if not 0 < count <= min(EARLY_STEPS, len(steps) - max(count, SETTLED_STEPS)) or large != steps[:count]:
        return None
    following = MismatchStats.merge_all(measured[step] for step in steps[count:])
    means = {step: _mean_abs_with_error(measured[step])[0] for step in large}
    return Burst(means, steps[count], _mean_abs_with_error(following)[0])


def _is_far_larger(stats: MismatchStats, settled: MismatchStats) -> bool:
    (mean, error), (later, later_error) = map(_mean_abs_with_error, (stats, settled))
    expected = max(later, _mean_abs_at_probabilities_of(stats, settled))
    return mean > BURST_FACTOR * expected and mean - expected > BURST_SURE * math.hypot(error, later_error)


def _too_large(steps: Mapping[int, MismatchStats], stats: MismatchStats, thresholds: Thresholds) -> tuple[str, ...]:
    """Say what is too large over all tokens, else what an alert fired for on the way."""
    if stats.finite_tokens and (found := too_large(stats.metrics(), thresholds)):
        return tuple(found)
    alerts = Alerts(thresholds)
    fired: dict[str, str] = {}
    for step in sorted(steps):
        alerts.update(step, steps[step].metrics())
        fired |= {alert.name: alert.message for alert in alerts.new if RULE[alert.name].of_size}
    return tuple(fired.values())


def _growth(measured: Mapping[int, MismatchStats]) -> Growth | None:
    first, *after = (step for step in measured if step <= min(measured) + EARLY_STEPS)
    if not after:
        return None
    later = MismatchStats.merge_all(measured[step] for step in after[-LATER_STEPS:])
    (first_mean, first_error), (later_mean, later_error) = map(_mean_abs_with_error, (measured[first], later))
    expected = max(first_mean, _mean_abs_at_probabilities_of(later, measured[first]))
    error = math.hypot(first_error * expected / first_mean if first_mean else 0.0, later_error)
    return Growth(
        first_step=first,
        first=first_mean,
        second=_mean_abs_with_error(measured[after[0]])[0],
        last_step=after[-1],
        later=later_mean,
        expected=expected,
        z=_quotient(later_mean - expected, error),
    )


def _mean_abs_at_probabilities_of(target: MismatchStats, source: MismatchStats) -> float:
    """Return the mean |d| that ``source`` would have if its probabilities were spread as ``target``'s; 0 if unknown."""
    known = {band.label: band.d_abs_mean for band in source.probability_bands() if band.tokens >= BAND_TOKENS}
    bands = [band for band in target.probability_bands() if band.label in known]
    tokens = sum(band.tokens for band in bands)
    return sum(known[band.label] * band.tokens for band in bands) / tokens if tokens else 0.0


def _mean_abs_with_error(stats: MismatchStats) -> tuple[float, float]:
    mean, variance = _mean_and_variance(stats.finite_tokens, stats.d_abs_sum, stats.d_square_sum)
    return mean, math.sqrt(variance / stats.finite_tokens)


def _long_growth(measured: Mapping[int, MismatchStats]) -> float | None:
    means = [stats.d_abs_sum / stats.finite_tokens for stats in measured.values()]
    if len(means) < 2 * EARLY_STEPS:
        return None
    return _quotient(statistics.median(means[-EARLY_STEPS:]), statistics.median(means[:EARLY_STEPS]))


def _shared_padding(stats: MismatchStats) -> float | None:
    """Return the sampler's log-prob of the worst tokens, if most that are far off have the very same one."""
    far_off = [token.sampler for token in stats.worst_tokens() if abs(token.d) > LARGE_D]
    value, count = Counter(far_off).most_common(1)[0] if far_off else (math.nan, 0)
    return value if count >= 3 and count >= 0.75 * len(far_off) else None


def _side(ledger: Roles, role_prefix: str, quantities: tuple[str, ...]) -> Side | None:
    seen = [
        (role, quantity, dtype)
        for role, row in ledger.items()
        if role.startswith(role_prefix)
        for quantity in quantities
        for dtype in row.get(quantity, [])
        if mantissa_bits(dtype) is not None
    ]
    if not seen:
        return None
    role, _, coarsest = min(seen, key=lambda entry: mantissa_bits(entry[2]) or 0)
    return Side(role, coarsest, tuple(quantity for _, quantity, dtype in seen if dtype == coarsest))


def _expected(histogram: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Return a function's mean over d and its standard error, each bin of d by the value that stands for it."""
    counts = histogram.double()
    n = float(counts.sum())
    if not n:
        return math.nan, math.nan
    values = function(bin_values())
    mean = float(counts @ values) / n
    return mean, math.sqrt(max(0.0, float(counts @ values.square()) / n - mean**2) / n)


def _mean_and_variance(count: int, total: float, squares: float) -> tuple[float, float]:
    mean = _quotient(total, count)
    return mean, max(0.0, squares / count - mean**2) if count else math.nan


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
