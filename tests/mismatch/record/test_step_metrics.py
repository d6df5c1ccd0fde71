"""Series of metrics over many steps: what is thinned, and what stays."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

from fp16_patch.mismatch.record import step_metrics
from fp16_patch.mismatch.record.step_metrics import EXACT_STEPS, StepMetrics

values = st.floats(-1e6, 1e6) | st.just(math.nan)


def test_of_few_steps_every_value_is_kept() -> None:
    rows = {step: {"a": step / 7, "b": 1.0} for step in range(EXACT_STEPS)}

    assert StepMetrics.of(rows).series("a") == {step: step / 7 for step in rows}


@given(
    rows=st.lists(st.dictionaries(st.sampled_from("abc"), values), max_size=120),
    exact=st.integers(4, 16),
    at_once=st.integers(1, 9),
)
@settings(deadline=None, max_examples=60)
def test_of_many_steps_the_extremes_and_the_ends_are_kept(
    rows: list[dict[str, float]], exact: int, at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step_metrics, "EXACT_STEPS", exact)
        patched.setattr(step_metrics, "ROWS_AT_ONCE", at_once)
        steps = StepMetrics.of({3 * number: row for number, row in enumerate(rows)})
        for name in "abc":
            whole = {3 * n: row[name] for n, row in enumerate(rows) if math.isfinite(row.get(name, math.nan))}
            series = steps.series(name)
            assert series.items() <= whole.items()
            assert [*series] == sorted(series)
            assert len(series) <= 2 * exact + 2
            if whole:
                assert {min(whole.values()), max(whole.values())} <= {*series.values()}
                assert {min(whole), max(whole)} <= series.keys()
    assert [*steps] == [3 * number for number in range(len(rows))]
    assert all(step in steps for step in steps) and 1 not in steps


def test_a_flood_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_metrics, "MOST_METRICS", 10)
    steps = StepMetrics.of({step: {f"metric {step}": 1.0} for step in range(100)})

    assert steps.series("metric 9") == {9: 1.0}
    assert steps.series("metric 10") == {}
    assert len(steps.left_out) == 10
