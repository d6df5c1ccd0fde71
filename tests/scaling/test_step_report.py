"""What is reported of skipped steps, and what waits for a step that is taken."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fp16_patch import Plan
from fp16_patch.scaling import lr_hold, step_report
from fp16_patch.scaling.lr_hold import HeldScheduleStep
from fp16_patch.scaling.optimizer_step import Attempt, OptimizerStep, history_of
from fp16_patch.scaling.scaler import StepOutcome
from fp16_patch.scaling.step_report import report_taken_norms

TAKEN, TAKEN_TOO, SKIPPED = StepOutcome(8.0, False, 1.0), StepOutcome(8.0, False, 3.0), StepOutcome(4.0, True, math.inf)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(**settings: Any) -> None:
        for module in (lr_hold, step_report):
            monkeypatch.setattr(module, "current_plan", lambda: Plan(**settings))

    return use


def reported(*outcomes: StepOutcome, **how: Any) -> dict[str, Any]:
    metrics = {"grad_norm": "the framework's", "loss": 0.5}
    report_taken_norms(metrics, "grad_norm", outcomes, **how)
    return metrics


def test_the_norms_of_taken_steps_are_reported_as_the_framework_does(plan: Any) -> None:
    plan()
    assert reported(TAKEN, SKIPPED, TAKEN_TOO) == {"grad_norm": [1.0, 3.0], "loss": 0.5}
    assert reported(TAKEN, SKIPPED, TAKEN_TOO, reduce=max)["grad_norm"] == 3.0


def test_where_every_step_was_skipped_there_is_no_norm(plan: Any) -> None:
    plan()
    assert reported(SKIPPED, SKIPPED) == {"loss": 0.5}


def test_a_norm_that_the_framework_does_not_report_is_not_added(plan: Any) -> None:
    plan()
    metrics: dict[str, Any] = {}
    report_taken_norms(metrics, "grad_norm", [TAKEN, SKIPPED])
    assert metrics == {}


def test_an_observed_run_reports_what_it_reports(plan: Any) -> None:
    plan(mode="observe")
    assert reported(TAKEN, SKIPPED)["grad_norm"] == "the framework's"


class Engine:
    """Has nothing but the slot."""


class Step(OptimizerStep):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, "actor")

    def note_dtypes(self) -> None:
        raise AssertionError("nothing steps here")

    def nonfinite_gradients(self) -> list[str]:
        return []


def advances(held: HeldScheduleStep, engine: Engine, *outcomes: StepOutcome) -> bool:
    for outcome in outcomes:
        Step.of(engine).history.add(outcome)
    return held() is not None


def test_the_schedule_advances_once_a_step_was_taken_since_it_last_did(plan: Any) -> None:
    plan()
    engine = Engine()
    held = HeldScheduleStep(lambda: "advanced", engine)
    assert advances(held, engine)  # nothing attempted: a checkpoint is loaded
    assert not advances(held, engine, SKIPPED)
    assert advances(held, engine, SKIPPED, TAKEN)
    assert not advances(held, engine, SKIPPED)
    assert advances(held, engine, TAKEN, SKIPPED)


def test_an_observed_run_does_not_hold_it(plan: Any) -> None:
    plan(mode="observe")
    engine = Engine()
    assert advances(HeldScheduleStep(lambda: "advanced", engine), engine, SKIPPED)


def test_one_slot_holds_the_steps_of_an_engine_and_may_be_shared() -> None:
    engine, optimizer = Engine(), Engine()
    step = Step.of(optimizer)
    assert Step.of(optimizer) is step
    assert history_of(engine) is not step.history
    step.share_with(engine)
    assert Step.of(engine) is step
    assert history_of(engine) is step.history
    assert list(vars(engine)) == ["_fp16_patch"]


def test_steps_are_recorded_while_they_are_asked_for() -> None:
    step = Step.of(Engine())
    step.record(Attempt(TAKEN, 8.0, []))
    with step.recording() as steps:
        step.record(Attempt(TAKEN_TOO, 8.0, []))
    step.record(Attempt(TAKEN, 8.0, []))
    assert [recorded.outcome for recorded in steps] == [TAKEN_TOO]
    assert steps[0].metrics["fp16/loss_scale"] == 8.0
