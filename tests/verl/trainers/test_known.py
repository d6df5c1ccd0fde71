"""A trainer of somebody's own is refused by name where it updates past the check, and else left alone."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("verl")

import fp16_patch
from fp16_patch import Plan
from fp16_patch.plan.errors import PlanError
from fp16_patch.verl.trainers.known import unknown_trainer
from fp16_patch.verl.trainers.v0_drivers import driver_of

pytestmark = pytest.mark.verl

# What is imported while patches are live keeps our wrappers, in every test that follows.
fp16_patch.deactivate()

from verl.trainer.ppo.ray_trainer import RayPPOTrainer

if not hasattr(RayPPOTrainer, "_update_actor"):
    pytest.skip("before verl 0.7.0 the workers' own calls are wrapped", allow_module_level=True)


class UpdatingPastIt(RayPPOTrainer):
    def fit(self) -> None:
        self.actor_rollout_wg.update_actor(None)


class GoingThroughIt(RayPPOTrainer):
    def fit(self) -> None:
        self._update_actor(None)

    def _update_actor(self, batch: Any) -> Any:
        return super()._update_actor(batch)


class Inheriting(UpdatingPastIt):
    pass


@pytest.mark.parametrize("trainer", [UpdatingPastIt, Inheriting])
def test_what_updates_past_the_check_is_named(trainer: type) -> None:
    said = str(unknown_trainer(trainer))
    assert (
        f"trainer={trainer.__module__}.{trainer.__qualname__}: its fit has the actor updated past _update_actor" in said
    )
    assert "FP16_PATCH=observe" in said


@pytest.mark.parametrize("trainer", [RayPPOTrainer, GoingThroughIt])
def test_what_goes_through_it_is_left_alone(trainer: type) -> None:
    assert unknown_trainer(trainer) is None


def test_it_is_refused_before_any_worker_is_started() -> None:
    trainer = UpdatingPastIt.__new__(UpdatingPastIt)
    fp16_patch.activate(Plan(mode="fp16"))
    try:
        with pytest.raises(PlanError, match="UpdatingPastIt"):
            driver_of(trainer).begin()
    finally:
        fp16_patch.deactivate()
