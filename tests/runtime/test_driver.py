"""A framework's driver: one a trainer, in one slot; what it opens, checks and records, whatever the framework."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from fp16_patch import PrecisionError
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime import activation, driver
from fp16_patch.runtime.driver import FrameworkDriver
from fp16_patch.runtime.ledger import Ledger


class Trainer:
    """Of some framework, and picklable."""


class Driven(FrameworkDriver):
    framework = "some"

    def reconcile(self) -> None:
        self.trainer.reconciled = True

    def refresh_attestations(self) -> None:
        self.trainer.refreshed = True

    def actors(self) -> list[tuple[str, Any]]:
        return []

    def required_quantities(self, updated: Collection[str]) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(updated, ("gradient",))

    def caveats(self) -> list[str]:
        return ["includes the weather"]

    def model(self) -> str:
        return "model"

    def sampler(self) -> str:
        return "sampler"

    def checkpoints(self) -> Path:
        return Path("checkpoints")


class OtherDriven(Driven):
    kind = "other_runner"


class Monitor:
    """What a run's monitor is told."""

    measures = True

    def __init__(self, plan: Plan, out_dir: Path, run: str | None = None) -> None:
        self.out_dir, self.run = out_dir, run
        self.documents: dict[str, Any] = {}
        self.told: list[Any] = []
        self.write = self.documents.__setitem__

    def expect(self, tokens: int) -> None:
        self.told.append(("expect", tokens))

    def end_step(self, step: int, metrics: dict[str, Any]) -> None:
        self.told.append(("end", step))

    def pass_step(self, step: int, metrics: dict[str, Any]) -> None:
        self.told.append(("pass", step))

    def flush(self) -> None:
        self.told.append("flush")


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process under an FP16 plan, without patches, and a monitor that needs no Ray."""
    monkeypatch.setattr(activation._state, "plan", Plan())
    monkeypatch.setattr(activation._state, "ledger", Ledger())
    monkeypatch.setattr(driver, "_running", None)
    monkeypatch.setattr(driver, "RunMonitor", Monitor)
    # There is no Ray: nobody is asked, and nobody told.
    monkeypatch.setattr("fp16_patch.runtime.preflight.ask", lambda actors: [])
    monkeypatch.setattr("fp16_patch.runtime.preflight.grant_training", lambda actors, sampler_keeps: None)


def test_a_trainer_has_one_driver() -> None:
    trainer = Trainer()
    assert Driven.of(trainer) is Driven.of(trainer)
    assert [*vars(trainer)] == ["_fp16_patch_driver"]
    assert Driven.of(Trainer()) is not Driven.of(trainer)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_trainer_has_a_driver_of_its_own_without_the_record(copied: Any) -> None:
    trainer = Trainer()
    Driven.of(trainer).begin()
    other = copied(trainer)
    assert Driven.of(other).trainer is other
    assert Driven.of(other).monitor is None


def test_it_begins_with_settings_caveats_and_the_plan_on_record(caplog: pytest.LogCaptureFixture) -> None:
    begun = Driven.of(Trainer())
    with caplog.at_level("WARNING"):
        begun.begin()
    assert begun.trainer.reconciled
    assert activation.ledger().kind == "task_runner"
    assert [record.getMessage() for record in caplog.records] == ["the mismatch of this run: includes the weather"]
    assert begun.monitor.out_dir == Path("checkpoints/fp16_patch")
    document = begun.monitor.documents["plan.json"]
    assert {name: document[name] for name in ("framework", "mode", "dtype", "model", "caveats")} == {
        "framework": "some",
        "mode": "fp16",
        "dtype": "float16",
        "model": "model",
        "caveats": ["includes the weather"],
    }


def test_where_no_trainer_is_at_hand_the_one_that_began_last_is_asked_for_by_its_kind() -> None:
    assert Driven.running() is None
    first, second = OtherDriven.of(Trainer()), Driven.of(Trainer())
    assert OtherDriven.running() is None
    first.begin()
    assert OtherDriven.running() is Driven.running() is first
    second.begin()
    assert Driven.running() is second
    assert OtherDriven.running() is None


def test_no_update_unless_all_is_as_planned() -> None:
    begun, updates = Driven.of(Trainer()), []
    begun.begin()

    def update(role: str) -> Any:
        return begun.checked_update(1, lambda: updates.append(role) or role, lambda result: [result])

    assert update("actor") == "actor"
    assert begun.trainer.refreshed
    assert begun.monitor.documents["ledger.json"]["processes"]
    # It has updated and so must have had gradients, which nobody has seen.
    with pytest.raises(PrecisionError, match="gradient"):
        update("actor")
    assert updates == ["actor"]


def test_steps_with_and_without_an_observation_go_on_record() -> None:
    silent = Driven(SimpleNamespace())
    for call in (lambda: silent.expect(3), lambda: silent.end_step(1, {}), silent.flush):
        call()  # without a record there is nothing to tell
    assert not silent.measures
    begun = Driven.of(Trainer())
    begun.begin()
    begun.expect(3)
    begun.end_step(1, {})
    begun.end_step(2, {}, observed=False)
    begun.flush()
    assert begun.monitor.told == [("expect", 3), ("end", 1), ("pass", 2), "flush"]
