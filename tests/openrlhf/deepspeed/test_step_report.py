"""What joins OpenRLHF's status after an update of several steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("torch")

from fp16_patch import Plan
from fp16_patch.openrlhf.deepspeed.step import DeepSpeedStep
from fp16_patch.openrlhf.deepspeed.step_report import train_and_report
from fp16_patch.scaling import optimizer_step, step_report
from fp16_patch.scaling.optimizer_step import Attempt
from fp16_patch.scaling.scaler import StepOutcome


class Engine:
    """Has nothing but the slot."""


@pytest.fixture(autouse=True)
def under_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    for module in (optimizer_step, step_report):
        monkeypatch.setattr(module, "current_plan", lambda: Plan())


def status_after(role: str, *skips: bool) -> dict[str, Any]:
    """Of steps with norms 1, 2, …, the first of which was tried once more."""
    engine = Engine()
    step = DeepSpeedStep.of(engine, role)
    step.record(Attempt(StepOutcome(8.0, False, 9.0), 8.0, []))  # of an update before
    step.history.add_retry()

    def train() -> dict[str, Any]:
        step.history.add_retry()
        for number, skipped in enumerate(skips, start=1):
            step.record(Attempt(StepOutcome(4.0, skipped, math.nan if skipped else float(number)), 8.0, []))
        return {f"{role}_grad_norm": 7.0, "loss": 0.5}

    return train_and_report(role, "fp16/critic/" if role == "critic" else "fp16/", engine, train)


def test_skips_are_reported_as_a_share_and_retries_as_those_of_the_update() -> None:
    status = status_after("actor", False, True, False, True)
    assert (status["fp16/step_skipped"], status["fp16/skipped_total"]) == (0.5, 2.0)
    assert (status["fp16/retries"], status["fp16/retries_total"]) == (1.0, 2.0)
    assert (status["fp16/loss_scale"], status["loss"]) == (4.0, 0.5)


def test_the_actors_norm_is_the_last_taken_and_the_critics_the_mean() -> None:
    assert status_after("actor", False, False, True)["actor_grad_norm"] == 2.0
    critic = status_after("critic", False, False, True)
    assert (critic["critic_grad_norm"], critic["fp16/critic/skipped_total"]) == (1.5, 1.0)


def test_without_a_skip_the_norm_is_openrlhfs_and_without_a_taken_step_there_is_none() -> None:
    assert status_after("actor", False, False)["actor_grad_norm"] == 7.0
    assert "actor_grad_norm" not in status_after("actor", True)
