"""Reads files of JSON lines that anybody may have written, a line at a time, however long a file or a line is."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from fp16_patch.untrusted.reading import Unreadable

try:
    from orjson import loads as _loads
except ImportError:  # the extra `report` brings it; whoever only writes a record goes without
    from json import loads as _loads  # type: ignore[assignment]

SKIPPED_AT_ONCE = 1 << 20
"""Bytes of the rest of a line that is too long."""

MOST_LISTS = 1 << 20
"""Lists and objects in a line: each takes far more memory than text."""


@contextmanager
def without_collector() -> Iterator[None]:
    """Let the collector of cycles rest: JSON has none, and it would look through every list that was just read."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def lines_of(file: BinaryIO, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its place in the file, in bytes; None for one of more than `most` bytes."""
    place = 0
    while text := file.readline(most + 1):
        start, place = place, place + len(text)
        if len(text) <= most:
            yield start, text
            continue
        # Whoever refuses it need not wait for its end.
        yield start, None
        while text and not text.endswith(b"\n"):
            text = file.readline(SKIPPED_AT_ONCE)
            place += len(text)


def json_of_line(text: bytes) -> Any:
    """Return what a line of JSON says.

    Its floats may be NaN or infinite, its whole numbers larger than a float; bytes that are not UTF-8 are replaced.

    Raises:
        Unreadable: it is no JSON, nested too deep, or holds more than `MOST_LISTS` lists and objects.
    """
    if len(text) > MOST_LISTS and text.count(b"[") + text.count(b"{") > MOST_LISTS:
        raise Unreadable(f"it holds more than {MOST_LISTS} lists")
    # orjson reads a line in a fifth of the time, but neither NaN, nor numbers beyond a float, nor what is not UTF-8.
    with suppress(ValueError, RecursionError):
        return _loads(text)
    try:
        return json.loads(text.decode("utf-8", errors="replace"))
    except RecursionError:
        raise Unreadable("it is nested too deep") from None
    except ValueError as problem:
        raise Unreadable(f"it is not JSON: {problem}") from None
