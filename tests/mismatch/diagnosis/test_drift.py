"""Drift told from numerics: by fresh tokens, or by how the gap grows with the lag."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from fp16_patch.mismatch.diagnosis.drift import LagCurve, drift
from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.record.reading import RunRecord
from fp16_patch.mismatch.statistics.by_lag import MOST_LAG
from fp16_patch.mismatch.statistics.summary import MismatchStats

NUMERICS = {"bfloat16": 7e-3, "float16": 9e-4}
TOKENS = 4000


def gap(numerics: float, drifted: float, seed: int, tokens: int = TOKENS) -> MismatchStats:
    """Tokens whose d is of both, normal and independent, each larger where the model is less sure of the token."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    scale = torch.rand(tokens, generator=generator, dtype=torch.float64) * 2
    d = scale * (numerics * parts[0] + drifted * parts[1]) * math.sqrt(math.pi / 2)
    sampler = torch.full((tokens // 40, 40), -6.0, dtype=torch.float64)
    return MismatchStats.from_log_probs(sampler, sampler + d.view_as(sampler), torch.ones_like(sampler))


def by_lag(numerics: float, step: float, lags: range, exponent: float = 1.5) -> dict[int, MismatchStats]:
    return {lag: gap(numerics, step * lag ** (exponent / 2), seed=lag) for lag in lags}


@pytest.mark.parametrize("numerics", NUMERICS.values(), ids=NUMERICS)
def test_fresh_tokens_are_measured(numerics: float) -> None:
    numeric = LagCurve.of(by_lag(numerics, 0.05, range(3))).numeric
    assert numeric is not None
    assert numeric.measured
    assert numeric.mean_abs == pytest.approx(numerics, rel=0.1)
    assert numeric.low < numeric.mean_abs < numeric.high


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_without_them_the_curve_is_extrapolated(exponent: float) -> None:
    numeric = LagCurve.of(by_lag(7e-3, 5e-3, range(1, 5), exponent)).numeric
    assert numeric is not None
    assert not numeric.measured
    assert numeric.low < 7e-3 < numeric.high


def test_bfloat16_and_float16_are_told_apart_by_the_fit() -> None:
    half, brain = (LagCurve.of(by_lag(numerics, 3e-3, range(1, 5))).numeric for numerics in (9e-4, 7e-3))
    assert half is not None
    assert brain is not None
    assert half.high < brain.low


def test_two_lags_are_enough_one_is_not() -> None:
    curve = by_lag(7e-3, 5e-3, range(1, 3))
    numeric = LagCurve.of(curve).numeric
    assert numeric is not None
    assert numeric.low < 7e-3 < numeric.high
    assert LagCurve.of({2: curve[2]}).numeric is None
    assert "cannot be told" in " ".join(drift(LagCurve.of({2: curve[2]})))


def test_where_drift_is_all_the_fit_says_how_little_it_knows() -> None:
    numeric = LagCurve.of(by_lag(9e-4, 0.1, range(1, 5))).numeric
    assert numeric is not None
    assert numeric.low < 9e-4 < numeric.high
    assert numeric.high > 5e-3


def test_the_oldest_lag_stands_for_several_and_is_not_fitted() -> None:
    curve = by_lag(7e-3, 5e-3, range(1, 4))
    fitted = LagCurve.of(curve).numeric
    assert LagCurve.of({**curve, MOST_LAG: gap(7e-3, 3.0, seed=99)}).numeric == fitted


def test_fresh_samples_have_no_drift_to_speak_of() -> None:
    assert drift(LagCurve.of({0: gap(9e-4, 0.0, 0)})) == ()
    assert drift(LagCurve.of({})) == ()


def run(curve: dict[int, MismatchStats], **facts: object) -> RunRecord:
    steps = {step: MismatchStats.merge_all(curve.values()) for step in (5, 6)}
    fresh = {step: curve.get(0, MismatchStats.empty()) for step in steps}
    return RunRecord(Path(), step_stats=steps, step_fresh=fresh, by_lag=curve, **facts)  # type: ignore[arg-type]


def test_a_run_is_judged_by_what_is_fresh() -> None:
    ledger = {"actor": {"autocast": ["float16"]}, "rollout": {"engine_weight": ["float16"]}}
    first, second = diagnose_run(run(by_lag(9e-4, 0.3, range(3)), ledger=ledger))
    assert (first.cause, second.cause) == ("drift", "precision")
    assert "67% of 12000 tokens" in first.evidence[0]
    assert "at lag 0" in first.evidence[1]
    assert "8000 tokens" in second.evidence[0]  # of both steps


def test_without_fresh_tokens_nothing_is_blamed_for_the_drift() -> None:
    (found,) = diagnose_run(run(by_lag(9e-4, 0.3, range(1, 3))))
    assert found.cause == "drift"
    assert "extrapolated" in found.evidence[2]


def test_broken_log_probs_are_named_whatever_their_age() -> None:
    curve = by_lag(9e-4, 0.3, range(3))
    sampler = torch.full((2, 40), -1.0)
    learner = sampler.clone()
    learner[0, 0] = math.nan
    curve[2] = curve[2] + MismatchStats.from_log_probs(sampler, learner, torch.ones_like(sampler))
    assert [finding.cause for finding in diagnose_run(run(curve))][:2] == ["nonfinite_learner", "drift"]
