"""What a checkpoint holds of a scaler, read as data: names, types and ranges; and what ranks agree on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from fp16_patch.scaling import agreed_state
from fp16_patch.scaling.agreed_state import agree
from fp16_patch.scaling.saved_state import (
    DEEPSPEED_SCALER,
    HISTORY,
    TORCH_SCALER,
    SavedState,
    history_of,
    is_scale,
    values_of,
    write_whole,
)
from fp16_patch.scaling.scaler import StepHistory, StepOutcome
from fp16_patch.untrusted.reading import Unreadable
from fp16_patch.untrusted.text import printable

SCALER = {"scale": 1024.0, "_growth_tracker": 7}
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)
NAMES = st.sampled_from([*TORCH_SCALER, *DEEPSPEED_SCALER, *HISTORY, "add", "last"])


@settings(max_examples=200)
@given(st.dictionaries(NAMES, VALUES) | VALUES)
@example({"scale": "\xa0"})
def test_whatever_was_saved_is_read_as_what_it_should_be_or_not_at_all(content: Any) -> None:
    for kinds in (TORCH_SCALER, DEEPSPEED_SCALER):
        try:
            values = values_of(content, kinds)
        except Unreadable as problem:
            assert printable(problem) == str(problem)
        else:
            assert values.keys() == kinds.keys()
            assert is_scale(next(iter(values.values())))
    try:
        history = history_of(content)
    except Unreadable:
        return
    steps = StepHistory()
    steps.load_state_dict(history)
    steps.add(StepOutcome(1.0, True, math.inf))
    assert steps.attempted >= steps.skipped_total >= steps.consecutive_skips > 0
    assert callable(steps.add)


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0, -4.0, 1e39, 1e-46, True, "1024", None, [1024.0]])
def test_a_scale_is_a_positive_number_of_fp32(scale: Any) -> None:
    with pytest.raises(Unreadable, match="its scale is .*, which is not a loss scale"):
        values_of({**SCALER, "scale": scale}, TORCH_SCALER)


def test_what_is_missing_or_wrong_is_named() -> None:
    for content, problem in (
        ({}, "it has no scale"),
        (["scale"], "it holds a list in the place of names and values"),
        ({**SCALER, "_growth_tracker": 2.5}, "its _growth_tracker is 2.5, which is not a count of steps"),
        ({**SCALER, "_growth_tracker": "\x1b[2J" * 200}, r"its _growth_tracker is \\x1b\[2J"),
    ):
        with pytest.raises(Unreadable, match=problem) as damage:
            values_of(content, TORCH_SCALER)
        assert len(str(damage.value)) < 300


@pytest.mark.parametrize(
    "change", [{"attempted": -1}, {"attempted": 2.0}, {"taken_since_lr": 1}, {"attempted": True}, {"skipped_total": 9}]
)
def test_a_history_that_cannot_be_is_not_read(change: dict[str, Any]) -> None:
    saved = {"attempted": 3, "skipped_total": 1, "consecutive_skips": 0, "taken_since_lr": True}
    assert history_of(saved) == saved
    with pytest.raises(Unreadable):
        history_of({**saved, **change})


def test_a_history_takes_over_its_own_names_only() -> None:
    steps = StepHistory()
    steps.load_state_dict({"attempted": 3, "add": 5, "last": 6, "calibrating": 7, "other": 8})
    assert steps == StepHistory(attempted=3)
    assert callable(steps.add)
    assert not hasattr(steps, "other")


def test_a_history_saves_the_names_that_are_read() -> None:
    assert StepHistory().state_dict().keys() == HISTORY.keys()
    assert history_of(StepHistory().state_dict()) == StepHistory().state_dict()


def agreed(monkeypatch: pytest.MonkeyPatch, *of_ranks: SavedState) -> tuple[SavedState, bool]:
    monkeypatch.setattr(agreed_state, "gather", lambda own: list(of_ranks))
    return agree(of_ranks[0])


def test_all_ranks_go_on_with_what_the_lowest_could_read(monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, good, other = (
        SavedState(problems={"rank_0.json": "it is not JSON"}),
        SavedState(SCALER, {"attempted": 3}),
        SavedState({**SCALER, "scale": 512.0}, {"attempted": 3}, {"rank_9.json": "it has no scale"}),
    )
    state, differ = agreed(monkeypatch, damaged, good, good)
    assert (state.scaler, state.history, differ) == (SCALER, {"attempted": 3}, False)
    assert state.listed_problems() == "rank_0.json: it is not JSON"
    state, differ = agreed(monkeypatch, damaged, other, good)
    assert state.scaler == other.scaler
    assert differ
    assert list(state.problems) == ["rank_0.json", "rank_9.json"]
    state, differ = agreed(monkeypatch, damaged, damaged)
    assert (state.scaler, state.history, differ) == (None, None, False)


def test_a_long_list_of_damaged_files_is_cut() -> None:
    state = SavedState(problems={f"rank_{rank}\n.json": "it is empty" for rank in range(100)})
    assert state.listed_problems().endswith("; and 96 more")
    assert printable(state.listed_problems()) == state.listed_problems()


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_whole(path, {"scale": 1.0})

    def disk_is_full(self: Path, text: str, **_: Any) -> None:
        with self.open("w") as file:
            file.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, {"scale": 2.0})
    assert json.loads(path.read_text()) == {"scale": 1.0}
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]
