"""Alerts: when one fires, what it says, and when it clears."""

from __future__ import annotations

import json
import math

import pytest

from fp16_patch.mismatch.diagnosis.alerts import Alert, Alerts
from fp16_patch.mismatch.diagnosis.judgement import Thresholds

BEYOND = {
    "k1": ("k1", -0.2),
    "ess": ("ess", 0.1),
    "chi2_token": ("chi2_token", 3.0),
    "token_mult_prob_error": ("token_mult_prob_error", 1.2),
    "prob_diff": ("prob_max_abs", 0.99),
}
"""Alert → the metric it watches, and a value beyond the default threshold."""

CALM = {"k1": 0.001, "ess": 0.99, "chi2_token": 0.01, "chi2_seq": 30.0, "token_mult_prob_error": 1.004}
CALM |= {"prob_max_abs": 0.03, "nonfinite_tokens": 0.0, "mean_abs": 4e-3}


def names(alerts: Alerts, step: int, **metrics: float) -> list[str]:
    values = {f"mismatch/{name}": value for name, value in metrics.items()}
    return [alert.name for alert in alerts.update(step, values)]


def of_k1(values: list[float], after: int = 2) -> list[bool]:
    """Whether the alert on k1 stands, step by step."""
    alerts = Alerts(Thresholds(after=after))
    return [names(alerts, step, k1=value) == ["k1"] for step, value in enumerate(values, start=1)]


def of_mean_abs(values: list[float], span: int) -> list[int]:
    """The steps, from 1, at which the trend's alert stands."""
    alerts = Alerts(Thresholds(doubling_steps=span))
    return [step for step, value in enumerate(values, start=1) if names(alerts, step, mean_abs=value) == ["doubling"]]


def test_a_calm_run_has_no_alert() -> None:
    alerts = Alerts(Thresholds())

    assert [name for step in range(300) for name in names(alerts, step, **CALM)] == []


@pytest.mark.parametrize("name", BEYOND)
def test_each_threshold_fires_its_own_alert(name: str) -> None:
    alerts = Alerts(Thresholds())
    metric, value = BEYOND[name]

    assert names(alerts, 1, **{**CALM, metric: value}) == []
    assert names(alerts, 2, **{**CALM, metric: value}) == [name]


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_none_or_zero_disables_an_alert(off: float | None) -> None:
    alerts = Alerts(
        Thresholds(k1=off, ess=off, chi2=off, token_mult_prob_error=off, prob_diff=off, doubling_steps=None)
    )
    everything = dict(BEYOND.values())

    assert [names(alerts, step, **everything) for step in range(5)] == [[]] * 5


def test_fires_after_consecutive_steps_only() -> None:
    assert of_k1([0.2, 0.05, 0.2, 0.05]) == [False] * 4
    assert of_k1([0.2, 0.2], after=3) == [False] * 2
    assert of_k1([0.2, -0.3, 0.2], after=3) == [False, False, True]


def test_clears_after_consecutive_steps_well_within_the_threshold() -> None:
    standing = of_k1([0.2, 0.2, 0.095, 0.095, 0.095, 0.05, 0.095, 0.05, 0.05])

    assert standing == [False, True, True, True, True, True, True, True, False]


def test_a_value_below_its_threshold_clears_well_above_it() -> None:
    alerts = Alerts(Thresholds(after=1))

    assert names(alerts, 1, ess=0.2) == ["ess"]
    assert names(alerts, 2, ess=0.32) == ["ess"]
    assert names(alerts, 3, ess=0.34) == []


def test_steps_without_measurement_neither_fire_nor_clear() -> None:
    assert of_k1([0.2, math.nan, 0.2]) == [False, False, True]
    assert of_k1([0.2, 0.2, math.nan, math.nan, 0.01, math.nan, 0.01]) == [False, True, True, True, True, True, False]

    alerts = Alerts(Thresholds())
    assert [names(alerts, 1, k1=0.2), names(alerts, 2), names(alerts, 3, k1=0.2)] == [[], [], ["k1"]]


def test_non_finite_tokens_fire_at_once_and_cannot_be_disabled() -> None:
    alerts = Alerts(Thresholds(k1=0, ess=0, chi2=0, token_mult_prob_error=0, prob_diff=0, doubling_steps=0))

    assert names(alerts, 1, nonfinite_tokens=1.0) == ["nonfinite"]
    assert names(alerts, 2, nonfinite_tokens=0.0) == ["nonfinite"]
    assert names(alerts, 3, nonfinite_tokens=0.0) == []


def test_new_names_what_fired_at_this_step() -> None:
    alerts = Alerts(Thresholds(after=1))
    fired = []
    for step, (k1, chi2) in enumerate([(0.2, 0.0), (0.2, 5.0), (0.2, 5.0), (0.0, 5.0), (0.2, 5.0)], start=1):
        names(alerts, step, k1=k1, chi2_token=chi2)
        fired.append([alert.name for alert in alerts.new])

    assert fired == [["k1"], ["chi2_token"], [], [], ["k1"]]


def test_an_alert_says_metric_value_threshold_and_since_when() -> None:
    alerts = Alerts(Thresholds())
    for step, k1 in ((7, -0.2), (8, -0.25), (9, -0.3)):
        (standing,) = alerts.update(step, {"mismatch/k1": k1}) or [None]

    assert standing == Alert(name="k1", metric="mismatch/k1", value=0.3, threshold=0.1, since_step=7)
    assert standing.message == "k1: |mismatch/k1| is 0.3, above 0.1, since step 7"
    assert json.loads(json.dumps(standing.as_dict())) == {"name": "k1", "value": 0.3, "threshold": 0.1, "since": 7}


def test_the_sentences_of_the_other_alerts() -> None:
    alerts = Alerts(Thresholds(after=1))
    values = {f"mismatch/{name}": value for name, value in {"ess": 0.1, "nonfinite_tokens": 3.0}.items()}

    assert [alert.message for alert in alerts.update(4, values)] == [
        "nonfinite: mismatch/nonfinite_tokens is 3 apart from certain tokens, and may only be 0, since step 4",
        "ess: mismatch/ess, a share of the tokens, is 0.1, below 0.3, since step 4",
    ]


def test_a_doubled_gap_fires_and_clears() -> None:
    jump = of_mean_abs([1.0] * 30 + [3.0] * 40, span=20)

    # The median of five turns at the third large value; alert_after is 2; 20 steps on, the large ones are the earlier.
    assert jump == list(range(34, 54))


def test_slow_growth_counts_as_doubling_only_over_the_span() -> None:
    growing = [2 ** (step / 100) for step in range(400)]

    assert of_mean_abs(growing, span=50) == []
    assert of_mean_abs(growing, span=150)[0] < 170


def test_odd_steps_are_no_trend() -> None:
    assert of_mean_abs([1.0] * 30 + [50.0, 50.0] + [1.0] * 30, span=20) == []


def test_a_trend_needs_measurements_from_so_long_ago() -> None:
    assert of_mean_abs([0.001, 0.001, 0.001, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0], span=100) == []
    assert of_mean_abs([0.0] * 30 + [1.0] * 30, span=20) == []


def test_the_trend_survives_gaps_in_the_measurement() -> None:
    values = [1.0 if step < 40 else 3.0 for step in range(80)]
    with_gaps = [math.nan if step % 3 else value for step, value in enumerate(values)]

    assert of_mean_abs(with_gaps, span=20)


def test_the_trend_says_what_doubled() -> None:
    alerts = Alerts(Thresholds(doubling_steps=20))
    for step in range(1, 61):
        standing = alerts.update(step, {"mismatch/mean_abs": 1.0 if step <= 40 else 2.5})

    (alert,) = standing
    assert alert.message == (
        "doubling: mismatch/mean_abs is 2.5 times what it was (alert_doubling_steps before), above 2, since step 43"
    )
