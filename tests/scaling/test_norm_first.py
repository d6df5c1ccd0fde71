"""Steps whose gradients' norm is not finite: torch's scaler takes some of them, ours none."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from fp16_patch import LossScaleCollapse, Plan
from fp16_patch.runtime import activation, preflight
from fp16_patch.scaling import norm_first, optimizer_step
from fp16_patch.scaling.optimizer_step import OptimizerStep
from fp16_patch.scaling.scaler import HIGHEST_SCALE, StepOutcome, set_scale, sharded_scaler, step_outcome
from tests.scaling.one_rank import one_rank

pytestmark = pytest.mark.usefixtures(one_rank.__name__)

HUGE = 1e30  # whose square is beyond FP32
NO_SCALES = (math.nan, math.inf, 0.0, -4.0)


class Engine:
    """Steps as frameworks do: unscales, clips, steps, adapts the scale, returns the norm."""

    def __init__(self, scaler: Any, clip: float = 1.0, optimizer: type = torch.optim.AdamW) -> None:
        torch.manual_seed(0)
        self.scaler, self.clip = scaler, clip
        self.model = nn.Linear(4, 4)
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)

    def backward(self, factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.ones(2, 4)).square().mean()
        self.scaler.scale(loss).backward()
        for parameter in self.model.parameters():
            parameter.grad.mul_(factor)

    def step(self) -> float:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm.item()

    def parameters(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in self.model.parameters()])


class Step(OptimizerStep):
    @property
    def scaler(self) -> Any:
        return self.engine.scaler

    def note_dtypes(self) -> None:
        pass

    def nonfinite_gradients(self) -> list[str]:
        return ["weight"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    def use(**settings: Any) -> Plan:
        made = Plan(**settings)
        monkeypatch.setattr(preflight, "require_training_grant", lambda: None)
        for module in (activation, optimizer_step):
            monkeypatch.setattr(module, "current_plan", lambda: made)
        return made

    return use


def run(engine: Engine) -> StepOutcome:
    outcome, _ = Step.of(engine, "actor").run(lambda: norm_first.take(engine.scaler, engine.step))
    return outcome


def trained_once(plan: Callable[..., Plan], **settings: Any) -> Engine:
    """With moments in its optimizer, by which a step of zeros would move the parameters."""
    engine = Engine(sharded_scaler(plan(init_scale=1024), "cpu"), **settings)
    engine.backward()
    assert not run(engine).skipped
    return engine


def test_torchs_scaler_takes_a_step_of_an_infinite_norm() -> None:
    engine = Engine(ShardedGradScaler("cpu", init_scale=1024))
    engine.backward()
    engine.step()
    before = engine.parameters()
    engine.backward(HUGE)
    assert math.isinf(engine.step())
    assert not torch.equal(engine.parameters(), before)
    assert engine.scaler.get_scale() == 1024


def test_torchs_scaler_makes_nan_of_the_parameters_where_nothing_is_clipped_or_the_scale_is_zero() -> None:
    for scale, factor, clip in ((1024.0, HUGE, math.inf), (0.0, 1.0, 1.0)):
        engine = Engine(ShardedGradScaler("cpu", init_scale=scale), clip)
        engine.backward(factor)
        engine.step()
        assert engine.parameters().isnan().any()


@pytest.mark.parametrize("clip", [1.0, math.inf])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_finite_gradients_of_an_infinite_norm_are_a_skipped_step(
    plan: Callable[..., Plan], optimizer: type, clip: float
) -> None:
    engine = trained_once(plan, clip=clip, optimizer=optimizer)
    before = engine.parameters()
    engine.backward(HUGE)
    outcome = run(engine)
    assert (outcome.skipped, outcome.loss_scale) == (True, 512)
    assert math.isinf(outcome.grad_norm)
    assert torch.equal(engine.parameters(), before)
    engine.backward()
    assert not run(engine).skipped
    assert not torch.equal(engine.parameters(), before)


def test_an_untroubled_step_is_torchs_to_the_last_bit(plan: Callable[..., Plan]) -> None:
    engine, stock = trained_once(plan), Engine(ShardedGradScaler("cpu", init_scale=1024))
    stock.backward()
    stock.step()
    assert torch.equal(engine.parameters(), stock.parameters())
    assert engine.scaler.state_dict()["_growth_tracker"] == stock.scaler.state_dict()["_growth_tracker"]


@pytest.mark.parametrize("scale", NO_SCALES)
def test_a_scale_that_is_none_costs_a_step_at_most_and_starts_anew(
    plan: Callable[..., Plan], scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    engine = trained_once(plan)
    engine.scaler._scale.fill_(scale)
    engine.backward()
    with caplog.at_level(logging.WARNING):
        run(engine)
    assert engine.parameters().isfinite().all()
    assert engine.scaler.get_scale() == 1024
    assert f"the loss scale was {scale:g}, with which nothing can be computed; it is now 1024" in caplog.text
    engine.backward()
    assert not run(engine).skipped


def test_collapse_stops_a_run_whose_scale_is_none_at_every_step(plan: Callable[..., Plan]) -> None:
    engine = trained_once(plan)
    with pytest.raises(LossScaleCollapse, match="20 optimizer steps in a row were skipped"):
        for _ in range(20):
            engine.scaler._scale.fill_(math.nan)
            engine.backward()
            assert run(engine).skipped
    assert engine.parameters().isfinite().all()


def test_the_scale_stops_growing_where_its_reciprocal_would_vanish(plan: Callable[..., Plan]) -> None:
    settings = plan(init_scale=HIGHEST_SCALE, growth_interval=1)
    engine = Engine(sharded_scaler(settings, "cpu"))
    engine.backward(0.0)
    assert run(engine).loss_scale == engine.scaler.get_scale() == HIGHEST_SCALE


def test_a_scale_below_the_floor_is_raised_in_metrics_and_scaler(plan: Callable[..., Plan]) -> None:
    engine = Engine(sharded_scaler(plan(init_scale=8, min_scale=6), "cpu"))
    engine.backward(math.inf)
    assert run(engine).loss_scale == engine.scaler.get_scale() == 6


@pytest.mark.parametrize("scale", [*NO_SCALES, 1e39, 1e-46, True])
def test_no_scaler_is_set_to_what_is_no_scale(scale: float) -> None:
    scaler = sharded_scaler(Plan(), "cpu")
    with pytest.raises(ValueError, match="is no loss scale"):
        set_scale(scaler, scale)
    assert scaler.get_scale() == 65536


class Scaler:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale

    def is_enabled(self) -> bool:
        return True


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("scale", [8.0, *NO_SCALES])
def test_a_norm_that_is_not_finite_is_a_skip_whatever_the_scale_did(scale: float, norm: float) -> None:
    for before in (8.0, *NO_SCALES):
        assert step_outcome(Scaler(scale), before, norm).skipped
    assert not step_outcome(Scaler(8.0), 8.0, 1.0).skipped


def test_a_step_that_torchs_scaler_took_alone_is_not_called_skipped() -> None:
    assert not step_outcome(Scaler(8.0), 8.0, math.inf, needs_finite_norm=False).skipped
    assert step_outcome(Scaler(4.0), 8.0, math.inf, needs_finite_norm=False).skipped
    assert step_outcome(Scaler(math.nan), math.nan, math.nan, needs_finite_norm=False).skipped
