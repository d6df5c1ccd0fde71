"""The optimizer steps of verl's workers, with the scaler that verl steps with and beside verl's own step."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fp16_patch import Plan
from fp16_patch.runtime import preflight
from fp16_patch.scaling.optimizer_step import history_of
from fp16_patch.verl.legacy import dp_actor
from tests.scaling.one_rank import one_rank

pytestmark = [pytest.mark.verl, pytest.mark.usefixtures(one_rank.__name__)]

HUGE = 1e30  # whose square is beyond FP32
HOOKS = {"step_with_scaler": dp_actor.step_with_scaler, "step_without_scaler": dp_actor.step_without_scaler}


class Actor(SimpleNamespace):
    def backward(self, factor: float = 1.0) -> None:
        self.actor_optimizer.zero_grad()
        self.scaler.scale(self.actor_module(torch.ones(2, 4)).square().mean()).backward()
        for parameter in self.actor_module.parameters():
            parameter.grad.mul_(factor)

    # As releases step, which ask whether there is a scaler, and as those do that know none.

    def step_with_scaler(self) -> torch.Tensor:
        self.scaler.unscale_(self.actor_optimizer)
        norm = nn.utils.clip_grad_norm_(self.actor_module.parameters(), 1.0)
        self.scaler.step(self.actor_optimizer)
        self.scaler.update()
        return norm

    def step_without_scaler(self) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(self.actor_module.parameters(), 1.0)
        if norm.isfinite():
            self.actor_optimizer.step()
        return norm

    def parameters(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in self.actor_module.parameters()])


@pytest.fixture(params=HOOKS)
def actor(
    request: pytest.FixtureRequest, activated: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> tuple[Actor, Callable[[], Any]]:
    """An actor that has taken a step, and its next ones."""
    activated(init_scale=1024)
    monkeypatch.setattr(preflight, "require_training_grant", lambda: None)
    made = Actor(actor_module=nn.Linear(4, 4))
    made.actor_optimizer = torch.optim.AdamW(made.actor_module.parameters(), lr=0.1)
    dp_actor.new_learner(lambda: None, made, (), {})

    def step() -> Any:
        return HOOKS[request.param](getattr(made, request.param), made, (), {})

    made.backward()
    assert step().isfinite()
    return made, step


def test_a_step_is_taken_and_counted_for_the_scales_growth(actor: tuple[Actor, Callable[[], Any]]) -> None:
    learner, step = actor
    before = learner.parameters()
    learner.backward()
    step()
    assert not torch.equal(learner.parameters(), before)
    assert learner.scaler.state_dict()["_growth_tracker"] == 2


@pytest.mark.parametrize("factor", [HUGE, math.inf])
def test_a_norm_that_is_not_finite_is_a_skipped_step_and_lowers_the_scale(
    actor: tuple[Actor, Callable[[], Any]], factor: float
) -> None:
    learner, step = actor
    before = learner.parameters()
    learner.backward(factor)
    assert not step().isfinite()
    assert torch.equal(learner.parameters(), before)
    assert learner.scaler.get_scale() == 512
    assert history_of(learner).skipped_total == 1


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0])
def test_a_scale_that_is_none_costs_one_step_and_starts_anew(
    actor: tuple[Actor, Callable[[], Any]], scale: float
) -> None:
    learner, step = actor
    before = learner.parameters()
    learner.scaler._scale.fill_(scale)
    learner.backward()
    step()
    assert torch.equal(learner.parameters(), before)
    assert learner.scaler.get_scale() == 1024
    assert history_of(learner).skipped_total == 1
