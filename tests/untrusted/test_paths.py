"""No path raises, wherever it leads."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch.untrusted.paths import from_home, is_file, is_folder, problem_of, reason_of
from fp16_patch.untrusted.reading import Unreadable, read_bytes

LONG = "n" * 5000


@pytest.mark.parametrize("path", [LONG, f"a/{LONG}", "a\0b", "~nobody-of-this-name/x", "\udc80", "", "loop/x"])
def test_a_path_that_leads_nowhere_holds_nothing(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert not is_file(path)
    assert not is_folder(path)
    assert from_home(path) == Path(path)


def test_what_can_lie_nowhere_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert problem_of(tmp_path / "absent") is None
    assert problem_of(tmp_path) is None
    assert problem_of(tmp_path / LONG) == "file name too long"
    assert problem_of(tmp_path / "loop") == "too many levels of symbolic links"
    assert problem_of("a\0b") == "a path holds no NUL character"
    assert problem_of("a\ud800b") == "a path holds no half of a surrogate pair"


@pytest.mark.parametrize(("path", "why"), [("a\0b", "no NUL character"), ("a\ud800b", "no half of a surrogate pair")])
def test_what_is_no_path_is_not_opened(path: str, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        read_bytes(Path(path))


@given(st.text(st.characters(), max_size=40))
def test_any_text_is_asked_and_read_as_a_path_without_harm(text: str) -> None:
    is_file(text)
    is_folder(text)
    problem_of(text)
    with contextlib.suppress(OSError, Unreadable):
        read_bytes(from_home(text), most=0)


def test_a_reason_is_the_systems_without_the_path() -> None:
    assert reason_of(PermissionError(13, "Permission denied", "secret")) == "permission denied"
    assert reason_of(Unreadable("it is not JSON")) == "it is not JSON"
    assert reason_of(OSError()) == "oserror"
