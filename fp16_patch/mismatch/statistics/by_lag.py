"""Tells the mismatch of fresh tokens from that of old ones, by the lag of the weights that they were sampled with.

The lag of a token is how many weight versions the learner's weights are newer than those that it was sampled with. At
lag 0 sampler and learner hold the same weights, so that the gap is numerics alone; what grows with the lag is drift.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.moments import mean
from fp16_patch.mismatch.statistics.summary import MismatchStats

Lags = Mapping[int, MismatchStats]
"""Lag → the mismatch of the tokens that have it. Of a sequence that spans several, each has its part."""

UNKNOWN = -1
MOST_LAG = 15
"""What is older counts as this old: 16 summaries a step at most."""

_OF_ANY_TOKEN = ("mismatch/nonfinite_", "mismatch/positive_", "mismatch/lag_")
_LAG0 = ("tokens", "mean_abs", "max_abs", "abs_p99", "k1", "k3", "ess", "seq_mean_abs")


def measure_by_lag(
    sampler: Tensor,
    learner: Tensor,
    mask: Tensor,
    lags: Tensor,
    token_ids: Tensor | None = None,
    first_sequence: int = 0,
) -> tuple[MismatchStats, dict[int, MismatchStats]]:
    """Summarize one batch, whole and by lag, without waiting for the learner's device.

    Args:
        lags: integers on the host, of the other tensors' shape, (sequences, tokens); ``UNKNOWN`` where nobody knows,
            anything where nothing was sampled. A lag below 0, of weights the learner does not have yet, is unknown.

    The other arguments are those of ``MismatchStats.from_log_probs``.

    Raises:
        ValueError: the shapes differ or are not two-dimensional.
    """
    if lags.shape != mask.shape:
        raise ValueError(f"expected lags of the mask's shape {tuple(mask.shape)}, got {tuple(lags.shape)}")
    stats: MismatchStats = MismatchStats.from_log_probs(
        sampler, learner, mask, token_ids=token_ids, first_sequence=first_sequence
    )
    lags = lags.clamp(UNKNOWN, MOST_LAG).to(torch.int8)
    # Not sorted, as `unique` does: there may be millions.
    present = [lag for lag in range(UNKNOWN, MOST_LAG + 1) if bool((lags == lag).any())]
    if len(present) == 1:
        return stats, {} if present == [UNKNOWN] else {present[0]: stats}
    on_device = lags.to(learner.device, non_blocking=True)
    by_lag = {
        lag: MismatchStats.from_log_probs(
            sampler,
            learner,
            mask.to(learner.device, dtype=torch.bool) & (on_device == lag),
            token_ids=token_ids,
            first_sequence=first_sequence,
        )
        for lag in present
        if lag != UNKNOWN
    }
    return stats, by_lag


def merge_by_lag(parts: Iterable[Lags]) -> dict[int, MismatchStats]:
    """Join what several have measured, lag by lag, in ascending order; what has no tokens is left out."""
    together: defaultdict[int, list[MismatchStats]] = defaultdict(list)
    for part in parts:
        for lag, stats in part.items():
            together[lag].append(stats)
    merged = {lag: MismatchStats.merge_all(together[lag]) for lag in sorted(together)}
    return {lag: stats for lag, stats in merged.items() if stats.tokens}


def lag_metrics(by_lag: Lags, tokens: int, prefix: str = "mismatch/") -> dict[str, float]:
    """Return the figures of a batch by lag; none where no token's lag is known.

    Args:
        tokens: all sampled tokens of the batch.

    =======================  ========================================================================================
    name                     formula
    =======================  ========================================================================================
    lag_mean, _min, _max     of the tokens whose lag is known; lags from ``MOST_LAG`` on count as that
    lag_known                share of the tokens whose lag is known
    lag0_…                   ``tokens``, ``mean_abs``, ``max_abs``, ``abs_p99``, ``k1``, ``k3``, ``ess`` and
                             ``seq_mean_abs`` of ``MismatchStats.metrics``, over tokens of lag 0
    stale_tokens, _mean_abs  tokens of lag 1 and more, and their mean |d|
    =======================  ========================================================================================
    """
    counts = {lag: stats.tokens for lag, stats in by_lag.items() if stats.tokens}
    known = sum(counts.values())
    if not known:
        return {}
    values = {
        "lag_mean": sum(lag * count for lag, count in counts.items()) / known,
        "lag_min": float(min(counts)),
        "lag_max": float(max(counts)),
        "lag_known": known / tokens if tokens else math.nan,
    }
    if 0 in counts:
        fresh = by_lag[0].metrics(prefix="")
        values |= {f"lag0_{name}": fresh[name] for name in _LAG0}
    stale = [by_lag[lag] for lag in counts if lag > 0]
    if stale:
        finite = sum(stats.finite_tokens for stats in stale)
        values["stale_tokens"] = float(sum(stats.tokens for stats in stale))
        values["stale_mean_abs"] = mean(sum(stats.d_abs_sum for stats in stale), finite)
    return {prefix + name: value for name, value in values.items()}


def of_numerics(metrics: Mapping[str, float], by_lag: Lags) -> dict[str, float]:
    """Return the figures by which a batch is judged: where lags are known, those of the tokens without drift.

    What may happen to no token at all is counted over all. Without tokens of lag 0 there are no other figures.

    Args:
        metrics: ``mismatch/*`` of the whole batch.
    """
    if not by_lag:
        return dict(metrics)
    fresh = by_lag[0].metrics() if 0 in by_lag else {}
    kept = {name: value for name, value in metrics.items() if name.startswith(_OF_ANY_TOKEN)}
    return {**fresh, **kept}


def staleness_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the lags of a batch as frameworks name them; of prime-rl's, over tokens where it takes rollouts.

    verl's are those that tokens tell: the oldest weights of any trajectory, and the newest.
    """
    if "mismatch/lag_mean" not in metrics:
        return {}
    least, greatest = metrics["mismatch/lag_min"], metrics["mismatch/lag_max"]
    return {
        "training/off_policy/trajectory_staleness/min": least,
        "training/off_policy/trajectory_staleness_worst/max": greatest,
        "off_policy_level/all/mean": metrics["mismatch/lag_mean"],
        "off_policy_level/all/min": least,
        "off_policy_level/all/max": greatest,
    }
