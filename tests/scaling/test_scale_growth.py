"""When torch's scaler may grow the loss scale, and when it counts anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from fp16_patch import Plan
from fp16_patch.runtime.torch_private import steps_since_growth
from fp16_patch.scaling import scale_growth
from fp16_patch.scaling.scale_growth import MARGIN, GradMaxWindow, fits_at_scale
from fp16_patch.scaling.scaler import StepHistory, StepOutcome

FP16_MAX = 65504.0


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)

    def use(**settings: Any) -> None:
        made = Plan(**settings)
        monkeypatch.setattr(scale_growth, "current_plan", lambda: made)

    return use


class Step:
    """An engine with torch's own scaler, whose gradients are as large as told."""

    def __init__(self, scale: float, interval: int) -> None:
        self.window, self.history = GradMaxWindow(), StepHistory()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.0)
        self.looks = self.overflows = 0

    def loss_scale(self) -> float:
        return float(self.scaler.get_scale())

    def update(self, largest: float) -> None:
        scale_growth.maybe_hold_growth(self.scaler, self.window, self.history.attempted, "actor")
        look = scale_growth.wants_gradient_stats(self.scaler, self.history.attempted)
        while True:
            scale = self.loss_scale()
            self.scaler.scale(torch.zeros(()))
            fits = largest * scale <= FP16_MAX
            self.weight.grad = torch.full((1,), largest * scale if fits else math.inf)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if fits:
                break
            self.overflows += 1
        self.history.add(StepOutcome(self.loss_scale(), False, 1.0))
        self.looks += look
        if look:
            self.window.add(self.history.attempted, largest)


def test_torchs_rule_grows_until_it_breaks(plan: Callable[..., None]) -> None:
    plan(scale_rule="torch", gradient_look_every=0)
    step = Step(1024.0, interval=4)
    for _ in range(15):
        step.update(10.0)
    # 65504 ÷ 10 = 6550
    assert (step.loss_scale(), step.overflows, step.looks) == (4096.0, 1, 0)


@pytest.mark.parametrize("every", [0, 3, 25])
@pytest.mark.parametrize("interval", [1, 2, 4, 7])
def test_the_scale_grows_to_what_leaves_the_margin_and_stays(
    plan: Callable[..., None], interval: int, every: int
) -> None:
    plan(scale_rule="ahead", gradient_look_every=every)
    step = Step(64.0, interval)
    for _ in range(20 * interval):
        step.update(10.0)
    # 65504 ÷ 10 ÷ 2 = 3275
    assert (step.loss_scale(), step.overflows) == (2048.0, 0)


def test_it_looks_only_before_it_could_grow_and_as_often_as_it_is_told(plan: Callable[..., None]) -> None:
    plan(scale_rule="ahead", gradient_look_every=0)
    step = Step(2048.0, interval=10)
    for _ in range(100):
        step.update(10.0)
    # Of ten updates one is asked for evidence.
    assert step.looks == 10
    plan(scale_rule="torch", gradient_look_every=10)
    before = step.looks
    for _ in range(100):
        step.update(10.0)
    assert step.looks - before == 10


def test_a_large_gradient_holds_growth_for_an_interval(plan: Callable[..., None]) -> None:
    plan(scale_rule="ahead", gradient_look_every=1)
    step = Step(1024.0, interval=4)
    step.update(25.0)
    for _ in range(4):
        step.update(10.0)
    assert step.loss_scale() == 1024.0
    for _ in range(4):
        step.update(10.0)
    assert step.loss_scale() == 2048.0


def test_an_overflow_halves_the_scale_under_either_rule(plan: Callable[..., None]) -> None:
    for rule in ("torch", "ahead"):
        plan(scale_rule=rule)
        step = Step(4096.0, interval=4)
        step.update(100.0)
        assert (step.loss_scale(), step.overflows) == (512.0, 3)


def test_a_resumed_run_looks_before_it_lets_the_scale_grow(plan: Callable[..., None]) -> None:
    plan(scale_rule="ahead", gradient_look_every=0)
    step = Step(4096.0, interval=4)
    scale_growth.set_growth_count(step.scaler, 3)
    step.update(10.0)
    assert (step.loss_scale(), steps_since_growth(step.scaler), step.looks) == (4096.0, 3, 1)
    step.update(10.0)
    assert (step.loss_scale(), step.overflows) == (4096.0, 0)


@given(st.floats(2.0**-20, 2.0**10), st.integers(-10, 24))
def test_what_is_borne_fits_with_the_margin(largest: float, exponent: int) -> None:
    scale = 2.0**exponent
    assume(fits_at_scale(largest, scale))
    assert largest * scale <= FP16_MAX / MARGIN
    assert fits_at_scale(largest / 2, scale)
    assert fits_at_scale(largest, scale / 2)


def test_nothing_is_borne_where_a_gradient_is_not_finite() -> None:
    assert not fits_at_scale(math.inf, 1.0)
    assert not fits_at_scale(math.nan, 1.0)


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 10)), max_size=20), st.integers(0, 50))
def test_the_largest_of_the_last_steps(looks: list[tuple[int, float]], since: int) -> None:
    seen = GradMaxWindow()
    for number, largest in sorted(looks):
        seen.add(number, largest)
    recent = [largest for number, largest in looks if number >= since]
    assert seen.largest(since) == (max(recent) if recent else None)


@given(st.lists(st.floats(1.0, 64.0), min_size=1, max_size=80), st.integers(1, 8))
def test_where_every_update_is_looked_at_it_overflows_no_more_often_than_torchs_rule_grows(
    gradients: list[float], interval: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_rank", lambda: 0)
        patch.setattr(scale_growth, "current_plan", lambda: Plan(scale_rule="ahead", gradient_look_every=1))
        step = Step(1.0, interval)
        before = step.loss_scale()
        for place, largest in enumerate(gradients):
            step.update(largest)
            after = step.loss_scale()
            if after > before:
                recent = gradients[max(0, place - interval) : place]
                # `before` is the scale of this update, which all the updates of the interval had or could have had.
                assert max(recent) * after * MARGIN <= FP16_MAX
            before = after
