"""What anybody may have written is read within bounds, and refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch.untrusted.reading import MAX_DEPTH, Unreadable, is_shallow, json_of, read_bytes, read_json

DEEP = "nested more than 64 deep"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, DEEP),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), DEEP),
        ('{"a":' * (MAX_DEPTH + 2) + "1" + "}" * (MAX_DEPTH + 2), DEEP),
        ("1" + "0" * 400, "does not fit 64 bits"),
        ("-" + "9" * 100_000, "does not fit 64 bits"),
        (str(2**63), "does not fit 64 bits"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("", "not JSON"),
        ('{"a": 1', "not JSON"),
    ],
)
def test_a_text_that_is_not_read_is_said_to_be_why(text: str | bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        json_of(text)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 0, 1.5, 1e308])
def test_numbers_within_64_bits_are_read(number: float) -> None:
    assert json_of(json.dumps([number])) == [number]


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert json_of(b"\xef\xbb\xbf{}") == {}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=30,
    )
)
def test_what_json_writes_is_read(content: object) -> None:
    assert json_of(json.dumps(content)) == content


@given(st.text() | st.binary())
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    with contextlib.suppress(Unreadable):
        json_of(text)


def test_depth_counts_lists_and_dicts() -> None:
    assert is_shallow(1, most=0)
    assert is_shallow({"a": [1]}, most=1)
    assert not is_shallow({"a": [[1]]}, most=1)


def test_devices_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = len([*Path("/proc/self/fd").iterdir()])
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(Unreadable, match="not a regular file"):
            read_bytes(path)
    with pytest.raises(Unreadable, match="NUL"):
        read_bytes(tmp_path / "a\0b")
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_of_a_file_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    file.write_bytes(b"[1, 2]")
    assert read_json(file, most=6) == [1, 2]
    with pytest.raises(Unreadable, match="larger than 5 bytes"):
        read_json(file, most=5)
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(Unreadable, match="larger than"):
        read_json(file)
