"""Lines of JSON are read alike with orjson, where it is installed, and without."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch.untrusted import lines
from fp16_patch.untrusted.lines import json_of_line, lines_of
from fp16_patch.untrusted.reading import Unreadable

LOADERS: list[Callable[[bytes], Any]] = [lines._loads, json.loads]


@pytest.fixture(params=LOADERS, ids=["as installed", "without orjson"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_loads", request.param)


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize(
    ("text", "content"),
    [
        (b'{"step": 1, "state": [1, 2.5]}\n', {"step": 1, "state": [1, 2.5]}),
        (b"[1e999, -1E400]", [math.inf, -math.inf]),
        (b"[Infinity]", [math.inf]),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'"\\ud800"', "\ud800"),
        (b'"\xff"', "\ufffd"),
    ],
)
def test_a_line_is_read(text: bytes, content: object) -> None:
    assert json_of_line(text) == content


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("text", [b"", b'{"step": 1', b"[1] x", b"[" * 100_000, b"\0"])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(Unreadable):
        json_of_line(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_what_json_writes_is_read_as_json_reads_it(content: object) -> None:
    text = json.dumps(content).encode()
    assert repr(json_of_line(text)) == repr(json.loads(text))


@given(st.binary())
def test_any_bytes_are_read_as_json_reads_them_or_refused(text: bytes) -> None:
    try:
        expected = repr(json.loads(text.decode("utf-8", errors="replace")))
    except (ValueError, RecursionError):
        with pytest.raises(Unreadable):
            json_of_line(text)
    else:
        assert repr(json_of_line(text)) == expected


def test_a_line_that_is_too_long_is_passed_over() -> None:
    file = io.BytesIO(b"short\n" + b"x" * 50 + b"\nlast")
    assert list(lines_of(file, 10)) == [(0, b"short\n"), (6, None), (57, b"last")]
