"""The mismatch by lag: what is of which lag, joined in any order, and named."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from fp16_patch.mismatch.statistics.by_lag import (
    MOST_LAG,
    UNKNOWN,
    lag_metrics,
    measure_by_lag,
    merge_by_lag,
    of_numerics,
    staleness_names,
)
from fp16_patch.mismatch.statistics.summary import MismatchStats

# Two sequences: one that spans a sync, and one of unknown origin whose last token was not sampled.
D = torch.tensor([[0.5, 0.5, 0.25, 0.25], [1.0, 1.0, 1.0, 9.0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
LAGS = torch.tensor([[2, 2, 0, 0], [UNKNOWN] * 4])


def measured(lags: torch.Tensor = LAGS) -> tuple[MismatchStats, dict[int, MismatchStats]]:
    sampler = torch.full(D.shape, -2.0)
    return measure_by_lag(sampler, sampler + D, MASK, lags)


def test_each_token_counts_at_its_lag_and_in_the_whole() -> None:
    stats, by_lag = measured()
    assert stats.tokens == 7
    assert {lag: (part.tokens, part.sequences, part.d_abs_sum) for lag, part in by_lag.items()} == {
        0: (2, 1, 0.5),
        2: (2, 1, 1.0),
    }


def test_a_sequence_is_split_at_the_version_s_change() -> None:
    _, by_lag = measured()
    assert by_lag[0].metrics(prefix="")["seq_mean_abs"] == 0.5
    assert by_lag[2].metrics(prefix="")["seq_mean_abs"] == 1.0


@pytest.mark.parametrize("lag", [0, 3])
def test_one_lag_of_all_tokens_is_measured_once(lag: int) -> None:
    stats, by_lag = measured(torch.full(D.shape, lag))
    assert by_lag == {lag: stats}


def test_of_no_known_lag_there_is_no_part() -> None:
    stats, by_lag = measured(torch.full(D.shape, UNKNOWN))
    assert stats.tokens == 7
    assert by_lag == {}
    assert lag_metrics(by_lag, stats.tokens) == {}


def test_what_is_very_old_is_counted_together_and_the_future_is_unknown() -> None:
    _, by_lag = measured(torch.tensor([[40, 50, -3, 1], [UNKNOWN] * 4]))
    assert {lag: part.tokens for lag, part in by_lag.items()} == {MOST_LAG: 2, 1: 1}


def test_lags_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="lags of the mask's shape"):
        measured(LAGS[:1])


def test_parts_join_in_any_order() -> None:
    _, one = measured()
    _, other = measured(torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]))
    for parts in ([one, other], [other, one]):
        merged = merge_by_lag(parts)
        assert list(merged) == [0, 1, 2]
        assert {lag: part.tokens for lag, part in merged.items()} == {0: 7, 1: 2, 2: 2}
        assert merged[0].d_abs_sum == pytest.approx(one[0].d_abs_sum + other[0].d_abs_sum)
    assert merge_by_lag([{4: MismatchStats.empty()}]) == {}


def test_the_figures_by_lag() -> None:
    stats, by_lag = measured()
    metrics = lag_metrics(by_lag, stats.tokens)
    assert metrics["mismatch/lag_mean"] == 1.0
    assert (metrics["mismatch/lag_min"], metrics["mismatch/lag_max"]) == (0.0, 2.0)
    assert metrics["mismatch/lag_known"] == pytest.approx(4 / 7)
    assert metrics["mismatch/lag0_tokens"] == 2
    assert metrics["mismatch/lag0_mean_abs"] == metrics["mismatch/lag0_max_abs"] == 0.25
    assert metrics["mismatch/stale_tokens"] == 2
    assert metrics["mismatch/stale_mean_abs"] == 0.5


def test_without_fresh_tokens_lag_0_has_no_figure() -> None:
    stats, by_lag = measured(torch.ones(D.shape, dtype=torch.int64))
    metrics = lag_metrics(by_lag, stats.tokens)
    assert [name for name in metrics if "lag0" in name] == []
    assert metrics["mismatch/stale_tokens"] == 7


def test_a_batch_is_judged_by_what_is_fresh_but_for_what_no_token_may_be() -> None:
    sampler = torch.full(D.shape, -2.0)
    learner = sampler + D
    learner[0, 0] = math.nan  # of lag 2
    stats, by_lag = measure_by_lag(sampler, learner, MASK, LAGS)
    judged = of_numerics(stats.metrics() | lag_metrics(by_lag, stats.tokens), by_lag)
    assert judged["mismatch/nonfinite_learner"] == 1
    assert judged["mismatch/mean_abs"] == 0.25
    assert judged["mismatch/lag_max"] == 2
    assert of_numerics(stats.metrics(), {}) == pytest.approx(stats.metrics(), nan_ok=True)
    assert "mismatch/mean_abs" not in of_numerics(stats.metrics(), {2: by_lag[2]})


def test_frameworks_names_of_staleness() -> None:
    stats, by_lag = measured()
    assert staleness_names(lag_metrics(by_lag, stats.tokens)) == {
        "training/off_policy/trajectory_staleness/min": 0.0,
        "training/off_policy/trajectory_staleness_worst/max": 2.0,
        "off_policy_level/all/mean": 1.0,
        "off_policy_level/all/min": 0.0,
        "off_policy_level/all/max": 2.0,
    }
    assert staleness_names({}) == {}
