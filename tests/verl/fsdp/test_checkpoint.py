"""The state file beside a checkpoint: saved and read again, whatever has become of it in between."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp16_patch import Plan
from fp16_patch.scaling.optimizer_step import OptimizerStep
from fp16_patch.scaling.saved_state import is_scale
from fp16_patch.scaling.scaler import StepHistory, StepOutcome, sharded_scaler
from fp16_patch.verl.fsdp import checkpoint

pytestmark = pytest.mark.verl

PLAN = Plan(init_scale=256, min_scale=2, growth_interval=50)
SAVED = 1024.0


@pytest.fixture(autouse=True, scope="module")
def one_rank_of_two() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.distributed, "get_rank", lambda: 0)
        patched.setattr(torch.distributed, "get_world_size", lambda: 2)
        patched.setattr(
            torch.distributed, "all_gather_object", lambda ranks, own: ranks.__setitem__(slice(None), [own] * 2)
        )
        patched.setattr(checkpoint, "current_plan", lambda: PLAN)
        yield


class Step(OptimizerStep):
    def __init__(self) -> None:
        super().__init__(SimpleNamespace(), "actor")
        self._scaler = sharded_scaler(PLAN, "cpu")

    @property
    def scaler(self) -> Any:
        return self._scaler

    def note_dtypes(self) -> None:
        pass

    def nonfinite_gradients(self) -> list[str]:
        return []


def stock(local_path: str) -> str:
    return "verl's own"


def save(folder: Path, step: Step | None = None) -> None:
    assert checkpoint.save_with_scaler(step or used_step(), stock, (), {"local_path": str(folder)}) == "verl's own"


def load(folder: Path) -> Step:
    step = Step()
    assert checkpoint.load_with_scaler(step, stock, (str(folder),), {}) == "verl's own"
    return step


def used_step() -> Step:
    step = Step()
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": SAVED, "_growth_tracker": 7})
    for skipped in (True, False, False):
        step.history.add(StepOutcome(SAVED, skipped, math.inf if skipped else 1.0))
    return step


def own_file(folder: Path) -> Path:
    return folder / "fp16_patch_scaler_world_size_2_rank_0.json"


def facts(step: Step) -> tuple[float, int, StepHistory]:
    state = step.scaler.state_dict()
    return state["scale"], state["_growth_tracker"], step.history


WHOLE = (SAVED, 7, StepHistory(attempted=3, skipped_total=1, taken_since_lr=True))
FRESH = (256.0, 0, StepHistory())


def test_what_was_saved_is_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [own_file(tmp_path).name]
    assert facts(load(tmp_path)) == WHOLE
    assert not caplog.records


def with_scaler(**values: Any) -> bytes:
    state = {"version": 1, "scaler": {"scale": SAVED, "_growth_tracker": 7, **values}, "history": {"attempted": 3}}
    return json.dumps(state).encode()


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is not JSON"),
    "truncated": (with_scaler()[:30], "it is not JSON"),
    "a list": (b"[1]", "it holds a list"),
    "no version": (b"{}", "it has no version"),
    "a later version": (b'{"version": 2}', "its version is 2, which is not version 1"),
    "true for a version": (b'{"version": true}', "its version is True"),
    "no scaler": (b'{"version": 1}', "it holds None in the place"),
    "NaN": (with_scaler(scale=math.nan), "its scale is nan"),
    "infinite": (with_scaler(scale=math.inf), "its scale is inf"),
    "zero": (with_scaler(scale=0), "its scale is 0"),
    "negative": (with_scaler(scale=-4), "its scale is -4"),
    "beyond FP32": (with_scaler(scale=1e39), "its scale is 1e+39"),
    "more digits than 64 bits": (with_scaler(_growth_tracker=10**400), "does not fit 64 bits"),
    "a history of texts": (
        b'{"version": 1, "scaler": {"scale": 8, "_growth_tracker": 0}, "history": {"attempted": "3"}}',
        "its attempted is 3, which is not a count",
    ),
    "not text": (b"\xff\xfe\x00", "it is not UTF-8 text"),
    "nested": (b"[" * 60_000, "it is nested more than"),
    "large": (b" " * 100_000, "it is larger than"),
}


@pytest.mark.parametrize(("content", "why"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_as_a_missing_one_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, why: str
) -> None:
    own_file(tmp_path).write_bytes(content)
    assert facts(load(tmp_path)) == FRESH
    (warning,) = caplog.messages
    assert warning.startswith("no loss-scaler state in ")
    assert f"{own_file(tmp_path)}: " in warning
    assert why in warning
    # Another rank's is as good.
    caplog.clear()
    save(tmp_path)
    own_file(tmp_path).rename(tmp_path / "fp16_patch_scaler_world_size_2_rank_1.json")
    own_file(tmp_path).write_bytes(content)
    assert facts(load(tmp_path)) == WHOLE
    (warning,) = caplog.messages
    assert "scale 1024" in warning
    assert f"{own_file(tmp_path)}: " in warning
    assert why in warning


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], None]
) -> None:
    make(own_file(tmp_path))
    assert facts(load(tmp_path)) == FRESH
    assert len(caplog.messages) == 1


def test_a_folder_that_is_not_there_is_a_new_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert facts(load(tmp_path / "none")) == FRESH
    assert caplog.messages[0].startswith("no loss-scaler state in ")


def test_floor_and_interval_are_the_plans(tmp_path: Path) -> None:
    own_file(tmp_path).write_bytes(with_scaler(scale=0.5, _growth_tracker=300))
    scale, growth, _ = facts(load(tmp_path))
    assert (scale, growth) == (2.0, 49)


def test_a_disk_that_is_full_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_is_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_is_full)
    save(tmp_path)
    assert caplog.messages == [
        "the loss-scaler state is not in the checkpoint, training goes on: [Errno 28] No space left on device"
    ]
    assert not list(tmp_path.iterdir())


GOOD = with_scaler()
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
CONTENTS = (
    st.binary(max_size=40)
    | st.integers(0, len(GOOD)).map(lambda end: GOOD[:end])
    | st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 7)).map(
        lambda flip: GOOD[: flip[0]] + bytes([GOOD[flip[0]] ^ 1 << flip[1]]) + GOOD[flip[0] + 1 :]
    )
    | st.dictionaries(st.sampled_from(["scale", "_growth_tracker"]), NUMBERS).map(lambda values: with_scaler(**values))
    | st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner)).map(
        lambda content: json.dumps(content).encode()
    )
)


@settings(max_examples=200)
@given(CONTENTS)
def test_any_file_is_read_or_warned_of(content: bytes) -> None:
    logger, said = logging.getLogger(checkpoint.__name__), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            own_file(Path(folder)).write_bytes(content)
            step = load(Path(folder))
    finally:
        logger.removeHandler(handler)
    scale, growth, history = facts(step)
    assert is_scale(scale)
    assert -1 <= growth < PLAN.growth_interval
    # Of what is in the file, blanks of other kinds are shown as they are.
    assert all(unicodedata.category(each) == "Zs" or each.isprintable() for warning in said for each in warning)
    assert (facts(step) == FRESH and len(said) == 1) or not said
    history.add(StepOutcome(scale, False, 1.0))
