"""When an update is tried again, and what is left as if it had not been."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fp16_patch import Plan
from fp16_patch.plan.errors import LossScaleCollapse
from fp16_patch.runtime import activation, preflight
from fp16_patch.scaling import first_scale, optimizer_step, retry, update
from fp16_patch.scaling.first_scale import measure_first_scale
from fp16_patch.scaling.optimizer_step import history_of
from fp16_patch.scaling.random_state import RandomState
from fp16_patch.scaling.scaler import StepOutcome
from fp16_patch.scaling.tensor_range import GRADIENT, OUTPUT, PARAMETER, AbsMaxHooks, first_nonfinite, largest_gradient
from fp16_patch.scaling.update import MiniBatchUpdate


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, that the driver has cleared."""
    monkeypatch.setattr(preflight, "require_training_grant", lambda: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda all_ranks, own: all_ranks.__setitem__(0, own))
    yield


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(**settings: Any) -> None:
        made = Plan(**settings)
        for module in (activation, retry, optimizer_step, first_scale, update):
            monkeypatch.setattr(module, "current_plan", lambda: made)

    return use


class Engine:
    """Overflows above a scale; halves it then."""

    def __init__(self, scale: float, bearable: float) -> None:
        self.scale, self.bearable = scale, bearable
        self.attempts: list[float] = []
        self.model = torch.nn.Linear(2, 2)

    def compute(self, again: bool = False) -> float:
        self.attempts.append(self.scale)
        self.model(torch.ones(1, 2)).sum().backward()
        _Update.of(self).run(self.step)
        return 1.0

    def step(self) -> float:
        if self.scale > self.bearable:
            self.scale /= 2
            return math.inf
        return 1.0


class _Update(MiniBatchUpdate):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, "actor")

    def loss_scale(self) -> float:
        return self.engine.scale

    def set_loss_scale(self, scale: float) -> None:
        self.engine.scale = scale

    def module(self) -> Any:
        return self.engine.model

    def outcome_of(self, returned: float, scale_before: float | None) -> StepOutcome:
        return StepOutcome(self.engine.scale, math.isinf(returned), returned)

    def note_dtypes(self) -> None:
        pass

    def nonfinite_gradients(self) -> list[str]:
        return ["weight"]

    def zero_grad(self) -> None:
        pass

    def loss_is_finite(self, result: Any) -> bool:
        return True


def finite(_: Any) -> bool:
    return True


def retry_on_overflow(engine: Engine, forward_was_finite: Any = finite) -> None:
    _Update.of(engine).retry_on_overflow(engine.compute, forward_was_finite)


def counts(engine: Engine) -> tuple[int, int, int]:
    history = history_of(engine)
    return history.attempted, history.skipped_total, history.retries_total


def test_it_is_tried_again_until_it_is_taken(plan: Any) -> None:
    plan()
    engine = Engine(64.0, bearable=8.0)
    retry_on_overflow(engine)
    assert engine.attempts == [64.0, 32.0, 16.0, 8.0]
    assert counts(engine) == (1, 0, 3)


def test_after_so_many_retries_it_is_a_skip(plan: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")  # what a framework imports may have made it ERROR, in the whole process
    plan(max_retries=2)
    engine = Engine(64.0, bearable=1.0)
    engine.scale = 64.0
    retry_on_overflow(engine)
    # Before the last retry the attempt is looked into, at its own scale.
    assert engine.attempts == [64.0, 32.0, 32.0, 16.0]
    assert counts(engine) == (1, 1, 2)
    assert "optimizer step 1 is tried again with the same mini-batch at 32" in caplog.text
    assert "overflowed at loss scale 16 after 2 retries" in caplog.text


def test_nothing_is_tried_again_at_the_floor(plan: Any) -> None:
    plan(min_scale=32.0)
    engine = Engine(64.0, bearable=1.0)
    with pytest.raises(LossScaleCollapse, match="min_scale=32"):
        retry_on_overflow(engine)
    assert engine.attempts == [64.0, 32.0]
    assert counts(engine) == (1, 1, 1)


def test_where_the_forward_is_not_finite_no_lower_scale_is_tried(plan: Any) -> None:
    plan()
    engine = Engine(64.0, bearable=1.0)
    retry_on_overflow(engine, lambda _: False)
    # The second attempt looks for the module.
    assert engine.attempts == [64.0, 64.0]
    assert engine.scale == 32.0
    assert counts(engine) == (1, 1, 0)


def test_where_the_loss_leaves_out_what_is_nan_no_lower_scale_is_tried(plan: Any) -> None:
    plan()
    engine = Engine(64.0, bearable=64.0)
    retry_on_overflow(engine)
    engine.bearable = 0.0
    with torch.no_grad():
        engine.model.bias.fill_(math.nan)
    retry_on_overflow(engine)
    # The last attempt looks for the module.
    assert engine.attempts == [64.0, 64.0, 64.0]
    assert engine.scale == 32.0
    assert counts(engine) == (2, 1, 0)


def test_a_mini_batch_that_overflows_at_every_scale_costs_the_next_ones_one_halving(plan: Any) -> None:
    plan(max_retries=4)
    engine = Engine(64.0, bearable=64.0)
    retry_on_overflow(engine)
    engine.bearable = 1.0
    retry_on_overflow(engine)
    assert engine.attempts == [64.0, 64.0, 64.0, 32.0, 16.0, 8.0, 8.0, 4.0]
    assert engine.scale == 32.0
    assert counts(engine) == (2, 1, 4)


def test_outside_an_update_it_is_a_skip(plan: Any) -> None:
    plan()
    engine = Engine(64.0, bearable=1.0)
    engine.compute()
    assert counts(engine) == (1, 1, 0)


def test_overflows_are_looked_into_a_few_times_a_run(plan: Any) -> None:
    plan()
    engine = Engine(8.0, bearable=8.0)
    engine.compute()
    for _ in range(5):
        engine.scale = 16.0
        retry_on_overflow(engine)
    looks = sum(before == after == 16.0 for before, after in zip(engine.attempts, engine.attempts[1:], strict=False))
    assert looks == 3
    assert counts(engine) == (6, 0, 5)


def test_the_generators_are_as_they_were() -> None:
    state = RandomState("cpu")
    first = torch.rand(3)
    state.restore()
    assert torch.equal(first, torch.rand(3))


def test_the_first_scale_leaves_room_over_the_largest_gradient(plan: Any) -> None:
    plan(mode="fp16")
    engine = Engine(1.0, bearable=math.inf)
    engine.model = torch.nn.Linear(2, 2).half()

    first = _Update.of(engine)

    def compute() -> None:
        assert first.measuring
        # The gradient of the output is 3, unscaled: 65536 is too much for it, 256 is not.
        (3.0 * engine.scale * engine.model(torch.full((1, 2), 0.5, dtype=torch.float16)).float().sum()).backward()

    first._measure_first_scale(compute, RandomState("cpu"))
    assert engine.scale == 2048.0  # 65504 ÷ 3 ÷ 8 = 2729
    assert not first.measuring


def test_a_batch_whose_loss_is_not_finite_decides_no_scale(plan: Any) -> None:
    plan()
    engine = Engine(1.0, bearable=math.inf)
    measure_first_scale(_Update.of(engine), RandomState("cpu"), lambda: None, lambda _: False)
    assert engine.scale == 65536.0


def test_gradients_that_are_finite_at_no_scale_decide_none(plan: Any) -> None:
    plan()
    engine = Engine(1.0, bearable=math.inf)
    engine.model = torch.nn.Linear(2, 2).half()

    def compute() -> None:
        (engine.model(torch.ones(1, 2, dtype=torch.float16)).float().sum() * math.nan).backward()

    measure_first_scale(_Update.of(engine), RandomState("cpu"), compute, finite)
    assert engine.scale == 65536.0


def test_the_first_place_that_is_not_finite_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with AbsMaxHooks(model) as hooks:
        output = model(torch.ones(1, 2))
        (output.sum() * math.inf).backward()
    place = first_nonfinite(hooks.largest())
    assert place is not None
    assert (place.module, place.kind) == ("1", GRADIENT)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with AbsMaxHooks(model) as hooks:
        model(torch.ones(1, 2))
    assert str(first_nonfinite(hooks.largest())) == f"0 ({OUTPUT})"
    assert not model[0]._forward_hooks


def test_gradients_count_in_their_own_dtype() -> None:
    model = torch.nn.Linear(2, 2)
    with AbsMaxHooks(model) as hooks:
        model(torch.full((1, 2), 4.0)).sum().backward()
    assert {place.kind for place in hooks.largest()} == {OUTPUT, GRADIENT, PARAMETER}
    assert largest_gradient(hooks.largest(), torch.float32) == 4.0
    assert largest_gradient(hooks.largest(), torch.float16) == 0.0
