"""A plan is turned on and off again, and leaves nothing; a refusal holds until its cause is mended."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from wrapt import importer

import fp16_patch
from fp16_patch import PatchError, Plan, PlanError
from fp16_patch.plan.plan import DRIVER_ENV, MODE_ENV, PLAN_ENV, SPOOL_ENV, TOLD_ENV
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import attestation
from fp16_patch.runtime.carried_plan import _arrive
from fp16_patch.runtime.ledger import Ledger


def left_behind(folder: Path) -> tuple[object, ...]:
    gc.collect()
    hooks = {name: len(waiting) for name, waiting in importer._post_import_hooks.items()}
    ours = logging.getLogger("fp16_patch").handlers
    return hooks, atexit._ncallbacks(), sys.meta_path[:], [*folder.iterdir()], ours[:], dict(os.environ)


def test_activations_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def on_and_off(mode: str) -> None:
        fp16_patch.activate(Plan(mode=mode))
        propagation.expect_children({"engine_core": 1})
        propagation.expect_children({"engine_core": 1, "sampler_worker": 2})
        assert len(list(tmp_path.iterdir())) == 1
        fp16_patch.deactivate()
        with monkeypatch.context() as wrong:
            wrong.setenv(MODE_ENV, "fp8")
            with pytest.raises(PlanError):
                fp16_patch.activate()
        fp16_patch.deactivate()

    modes = ("fp16", "observe", "fp32")
    for mode in modes:
        on_and_off(mode)
    before, objects = left_behind(tmp_path), len(gc.get_objects())
    for mode in (*modes, *modes):
        on_and_off(mode)
    assert left_behind(tmp_path) == before
    assert not list(tmp_path.iterdir())
    # What is left of a cycle is 1,100 objects if its hooks stay.
    assert len(gc.get_objects()) - objects < 200


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that a run of verl cannot do without."""
    package = tmp_path / "verl" / "trainer"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "main_ppo.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield "verl.trainer.main_ppo"
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        del sys.modules[name]


def test_a_refusal_holds_until_its_cause_is_mended(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_ENV, "fp8")
    with pytest.raises(PlanError):
        fp16_patch.activate()
    for _ in range(2):
        with pytest.raises(PatchError, match=r"main_ppo is not imported: fp16_patch refused .*=fp8: no such mode"):
            importlib.import_module(trainer)
    assert "no such mode" in attestation()["problem"]
    monkeypatch.setenv(MODE_ENV, "observe")
    monkeypatch.setenv("FP16_PATCH_STRICT", "0")  # this verl has no more than a name
    fp16_patch.activate()
    importlib.import_module(trainer)


def test_another_plan_than_the_one_in_force_is_refused_and_stops_nothing(trainer: str) -> None:
    fp16_patch.activate(Plan(mode="observe", strict=False))
    with pytest.raises(PlanError, match="is in force already"):
        fp16_patch.activate(Plan())
    importlib.import_module(trainer)


def test_off_said_here_is_obeyed_and_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(PLAN_ENV, Plan().to_json())
    monkeypatch.setenv(MODE_ENV, "off")
    monkeypatch.setenv(DRIVER_ENV, "damaged, which is nobody's affair then")
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        assert not fp16_patch.activate().active
    (told,) = [record.getMessage() for record in caplog.records]
    said = "FP16_PATCH=off here counts, not the plan carried to this process"
    assert told == f"fp16_patch: {said}; it computes as its framework does"
    # And so the driver of a job in which it was to compute says why it stops.
    assert attestation()["problem"] == said


def test_a_plan_that_code_gives_counts_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PLAN_ENV, Plan().to_json())
    monkeypatch.setenv(MODE_ENV, "fp16")
    fp16_patch.activate(Plan(mode="observe"))
    said = "the plan given to activate() counts (mode observe), not the one carried to this process"
    assert said in capsys.readouterr().err


def test_a_plan_in_an_object_meets_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP16_PATCH_INIT_SCALE", "7")
    with pytest.raises(PlanError, match=r"^FP16_PATCH_INIT_SCALE=7: the plan that was carried to this process says"):
        _arrive(Plan(mode="observe").to_json(), "{}")
    fp16_patch.deactivate()
    arrived = _arrive(Plan(mode="observe").to_json(), '{"FP16_PATCH_INIT_SCALE": "7"}')
    assert arrived.plan == Plan(mode="observe")


def test_what_a_plan_was_made_under_is_carried_on_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_ENV, "1")
    monkeypatch.setenv("FP16_PATCH_STRICT", "0")
    fp16_patch.activate()
    told = os.environ[TOLD_ENV]
    assert told == '{"FP16_PATCH": "1", "FP16_PATCH_STRICT": "0"}'
    propagation.carry(Plan(mode="bf16"))
    assert os.environ[TOLD_ENV] == told
    # A process whose environment is the one of `ray start`, with the plan added: it says nothing of its own.
    there = {**os.environ, MODE_ENV: "1"}
    assert Plan.from_environment(there) == Plan(mode="bf16")


CARRIED = [PLAN_ENV, TOLD_ENV, DRIVER_ENV, SPOOL_ENV]


@pytest.mark.parametrize("variable", CARRIED)
@pytest.mark.parametrize(
    "garbage", ["{", "[" * 90_000, "null", "[]", '"text"', "7", "\x1b[2J", '{"a": 1}', '{"a": ' + "9" * 30 + "}"]
)
def test_a_damaged_variable_is_named(variable: str, garbage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAN_ENV, Plan(mode="observe").to_json())
    monkeypatch.setenv(MODE_ENV, "observe")
    monkeypatch.setenv(variable, garbage)
    with pytest.raises(PlanError) as refused:
        fp16_patch.activate()
    first, *_ = str(refused.value).splitlines()
    assert first.startswith(f"{variable}=")
    assert "Fix: " in first
    assert first.isprintable()
    assert len(first) < 500


@pytest.mark.parametrize(
    "change", [{"host": 7}, {"roles": []}, {"roles": {"actor": {"master": "float32"}}}, {"keeps": 1}]
)
def test_a_record_of_another_form_is_none(change: dict[str, object], tmp_path: Path) -> None:
    record = Ledger().record(Plan(), {})
    propagation.expect_children({})
    folder = Path(os.environ[SPOOL_ENV].partition(":")[2])
    try:
        (folder / "17.json").write_text("{")
        (folder / "18.json").write_text(json.dumps({**record, **change}))
        left = propagation.children()
        assert [each["problem"] is not None for each in left] == [True, True]
    finally:
        propagation.stop_carrying()
    assert not folder.exists()
