"""Calibration, collapse and what is saved: the parts that need no engine."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch.plan.plan import Plan
from fp16_patch.scaling.scaler import (
    GRADIENT_MARGIN,
    LARGEST_SCALE,
    StepHistory,
    StepOutcome,
    collapse_reason,
    fitting_scale,
    nonfinite_parameters,
    sharded_scaler,
)

torch = pytest.importorskip("torch")


def history(*skipped: bool, scale: float = 8.0) -> StepHistory:
    steps = StepHistory()
    for skip in skipped:
        steps.add(StepOutcome(scale, skip, math.inf if skip else 1.0))
    return steps


@given(st.lists(st.booleans(), min_size=1))
def test_counters_follow_the_outcomes(skips: list[bool]) -> None:
    steps = history(*skips)
    assert steps.attempted == len(skips)
    assert steps.skipped_total == sum(skips)
    assert steps.consecutive_skips == len(skips) - max((i + 1 for i, skip in enumerate(skips) if not skip), default=0)
    assert steps.taken_since_lr == (not all(skips))
    assert steps.calibrating == all(skips)


@given(st.lists(st.booleans(), min_size=1))
def test_a_restored_history_goes_on_where_it_was(skips: list[bool]) -> None:
    before, after = history(*skips), StepHistory()
    after.load_state_dict(before.state_dict())
    outcome = StepOutcome(8.0, True, math.inf)
    before.add(outcome)
    after.add(outcome)
    assert before == after


def test_a_state_saved_before_there_were_retries_loads() -> None:
    steps = StepHistory()
    steps.load_state_dict({"attempted": 3, "skipped_total": 1, "consecutive_skips": 0, "taken_since_lr": True})
    assert (steps.attempted, steps.retries_total) == (3, 0)


def test_a_retry_is_neither_attempted_nor_skipped() -> None:
    steps = history(False)
    steps.add_retry()
    steps.add_retry()
    steps.add(StepOutcome(8.0, False, 1.0))
    assert (steps.attempted, steps.skipped_total, steps.calibrating) == (2, 0, False)
    assert steps.metrics()["fp16/retries"] == steps.metrics()["fp16/retries_total"] == 2.0
    assert steps.metrics()["fp16/step_skipped"] == 0.0


@given(st.floats(1e-3, 1e12))
def test_the_first_scale_is_a_power_of_two_with_room(headroom: float) -> None:
    scale = fitting_scale(headroom)
    assert math.log2(scale).is_integer()
    assert 1 <= scale <= LARGEST_SCALE
    assert scale == 1 or headroom / scale >= GRADIENT_MARGIN
    assert scale == LARGEST_SCALE or headroom / scale < 2 * GRADIENT_MARGIN


def test_gradients_that_are_all_zero_get_the_largest_scale() -> None:
    assert fitting_scale(math.inf) == LARGEST_SCALE


def test_there_is_no_loss_scale_to_report_without_a_scaler() -> None:
    steps = StepHistory()
    steps.add(StepOutcome(None, False, 1.0))
    assert set(steps.metrics()) == {"fp16/step_skipped", "fp16/skipped_total", "fp16/consecutive_skips"}


def test_skips_are_calibration_until_a_limit_is_reached() -> None:
    plan = Plan(max_consecutive_skips=3)
    assert collapse_reason(plan, history(True, True), 8.0) is None
    assert collapse_reason(plan, history(True, True, True), 8.0) is not None
    assert collapse_reason(plan, history(True, True, False, True), 8.0) is None


def test_an_overflow_at_the_floor_is_a_collapse_and_names_the_setting() -> None:
    plan = Plan(min_scale=4.0)
    assert collapse_reason(plan, history(True), 8.0) is None
    reason = collapse_reason(plan, history(True), 4.0)
    assert reason is not None
    assert "setting min_scale=4" in reason


def test_without_a_scaler_only_the_streak_counts() -> None:
    plan = Plan(mode="bf16", max_consecutive_skips=2)
    assert collapse_reason(plan, history(True), None) is None
    assert collapse_reason(plan, history(True, True), None) is not None


def test_the_scaler_has_the_plans_settings_and_is_on_wherever_the_device_is() -> None:
    plan = Plan(init_scale=1024.0, growth_interval=7, growth_factor=4.0, backoff_factor=0.25)
    scaler = sharded_scaler(plan, "cpu")
    assert scaler.is_enabled()
    assert scaler.get_scale() == 1024.0
    assert (scaler.get_growth_interval(), scaler.get_growth_factor(), scaler.get_backoff_factor()) == (7, 4.0, 0.25)


def test_a_scaler_torch_disables_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(RuntimeError, match="disabled its gradient scaler on device 'cuda'"):
        sharded_scaler(Plan(), "cuda")


def test_culprits_are_the_first_parameters_with_non_finite_gradients() -> None:
    good, nan, inf = torch.ones(2), torch.tensor([1.0, math.nan]), torch.tensor([-math.inf])
    named = [("a", good), ("b", nan), ("c", inf), ("d", nan), ("e", nan)]
    assert nonfinite_parameters(named) == ["b", "c", "d"]
    assert nonfinite_parameters([("a", good * 3e38)]) == []
