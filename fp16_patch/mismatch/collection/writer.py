"""Writes the record in the background: whoever hands on a line never waits for the disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fp16_patch.mismatch.collection.background import Background
from fp16_patch.plan.guard import Guard

logger = logging.getLogger(__name__)

MAX_WAITING = 256


class Writer:
    """Appends lines and replaces documents in one directory, in the order they came.

    A disk that is full or gone costs what was to be written, and one warning; what follows is tried again.
    """

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        guard = Guard(logger, f"the record in {out_dir} is incomplete, training goes on")
        self._tasks: Background[Callable[[], None]] = Background(lambda task: task(), MAX_WAITING, guard)

    @property
    def dropped(self) -> int:
        """Count the lines and documents that are not on disk."""
        return self._tasks.dropped

    def append(self, name: str, record: dict[str, Any]) -> None:
        self._tasks.put(lambda: _append(self._directory() / name, record))

    def write(self, name: str, document: dict[str, Any]) -> None:
        self._tasks.put(lambda: _replace(self._directory() / name, document))

    def flush(self, timeout_s: float) -> bool:
        """Wait for what was handed on so far; False if that took too long."""
        return self._tasks.flush(timeout_s)

    def _directory(self) -> Path:
        self.out_dir.mkdir(parents=True, exist_ok=True)
        return self.out_dir


def _append(path: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record).encode() + b"\n"
    with path.open("a+b") as lines:
        lines.write(b"\n" + line if _is_cut_off(lines) else line)


def _is_cut_off(lines: IO[bytes]) -> bool:
    """Return whether the last line has no end: its writer was killed, or the disk was full."""
    if lines.seek(0, os.SEEK_END) == 0:
        return False
    lines.seek(-1, os.SEEK_END)
    return lines.read(1) != b"\n"


def _replace(path: Path, document: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1), encoding="utf-8")
    partial.replace(path)
