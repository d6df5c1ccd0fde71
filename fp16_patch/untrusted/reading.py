"""Reads files and JSON that anybody may have written: regular files only, of bounded size, depth and numbers."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fp16_patch.untrusted.paths import no_path

MAX_DEPTH = 64
"""Nothing that is read nests so deeply; what does would exhaust the stack of whatever walks it."""

MAX_DOCUMENT_BYTES = 64 * 2**20
"""Of a file that is read whole."""

_INT64 = 2**63


class Unreadable(ValueError):
    """Says in one sentence, without the file's name, why a text is not read."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened.
        Unreadable: it is a pipe, a device or a folder; or its name is no path.
    """
    try:
        # A pipe without a writer would keep `open` waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise Unreadable(no_path(path)) from None
    # Python opens no folder, and would leave it to the system to close it.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable("it is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_bytes(path: Path, most: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Return what a file holds.

    Args:
        most: bytes.

    Raises:
        OSError: it cannot be opened or read.
        Unreadable: it is a pipe, a device or a folder, or larger than `most`; or its name is no path.
    """
    with opened(path) as file:
        # The size is asked first, so that nothing is read in vain; it may be wrong, as in /proc, or grow.
        content = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if content is None or len(content) > most:
        raise Unreadable(f"it is larger than {most} bytes")
    return content


def read_json(path: Path, most: int = MAX_DOCUMENT_BYTES) -> Any:
    """Return what a JSON file holds.

    Raises:
        OSError: it cannot be opened or read.
        Unreadable: it is no regular file of bounded size, or not what `json_of` reads.
    """
    return json_of(read_bytes(path, most))


def json_of(text: str | bytes) -> Any:
    """Return what a JSON text says. Its floats may be NaN or infinite; its whole numbers fit 64 bits.

    Raises:
        Unreadable: it is not UTF-8, no JSON, nested more than `MAX_DEPTH` deep, or holds a larger whole number.
    """
    try:
        content = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, parse_int=_int64)
    except RecursionError:
        raise Unreadable(f"it is nested more than {MAX_DEPTH} deep") from None
    except Unreadable:
        raise
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8 text") from None
    except ValueError as problem:
        raise Unreadable(f"it is not JSON: {problem}") from None
    if not is_shallow(content):
        raise Unreadable(f"it is nested more than {MAX_DEPTH} deep")
    return content


def is_shallow(content: Any, most: int = MAX_DEPTH) -> bool:
    """Return whether lists and dicts are nested no deeper than this."""
    level = [content]
    for _ in range(most + 1):
        inner = [child for parent in level if isinstance(parent, dict | list) for child in _children(parent)]
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return True
    return False


def _children(parent: dict[str, Any] | list[Any]) -> Any:
    return parent.values() if isinstance(parent, dict) else parent


def _int64(digits: str) -> int:
    # Longer ones take Python quadratic time to read, and torch none of them.
    number = int(digits) if len(digits) <= 20 else _INT64
    if not -_INT64 <= number < _INT64:
        raise Unreadable("it holds a whole number that does not fit 64 bits")
    return number
