"""Reads a file of lines in the order of their steps, of each step the last line, a line at a time."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

import torch

from fp16_patch.mismatch.record.lines import MOST_STEP, Line, parse_line
from fp16_patch.untrusted.lines import lines_of

MAX_LINE_BYTES = 1 << 22
"""A line with every cell of both states filled has a tenth of that."""

# How our lines begin. Of others the whole line says which step it is of.
_STEP = re.compile(rb'\s*\{\s*"step"\s*:\s*(-?\d{1,16})\s*[,}]')


AT_ONCE = 4096


class StepLines:
    """The lines of an open file by step: `len()` steps, of which some may turn out to have no readable line.

    The file is read twice: once for the places of the lines, of which 16 bytes each are held, and once in the order of
    steps. What is written meanwhile is not read.

    Attributes:
        unreadable, too_long: lines that were left out. ``cut_off``: the last line is unreadable; it is not counted
            among the others. All are known once the lines have been read.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.unreadable = self.too_long = 0
        self.cut_off = False
        self._file, self._end = file, -1
        steps, places = self._scan()
        self._at = file.tell()
        # A stable sort: the lines of a step stay in the order in which they were written.
        order = torch.tensor(steps, dtype=torch.int64).sort(stable=True)
        self._steps, self._places = order.values, torch.tensor(places, dtype=torch.int64)[order.indices]

    def __len__(self) -> int:
        return len(self._steps.unique_consecutive())

    def __iter__(self) -> Iterator[Line]:
        for step, places in groupby(self._pairs(), key=itemgetter(0)):
            last: Line | None = None
            for _, place in places:
                last = self._line(step, place) or last
            if last is not None:
                yield last

    def _scan(self) -> tuple[array[int], array[int]]:
        steps, places = array("q"), array("q")
        unreadable = -1
        for place, text in lines_of(self._file, MAX_LINE_BYTES):
            if text is not None and not text.strip():
                continue
            self._end = place
            if text is None:
                self.too_long += 1
            elif (step := _step_of(text)) is not None:
                steps.append(step)
                places.append(place)
            else:
                self.unreadable, unreadable = self.unreadable + 1, place
        if unreadable == self._end:
            self._leave_out_last()
        return steps, places

    def _pairs(self) -> Iterator[tuple[int, int]]:
        for steps, places in zip(self._steps.split(AT_ONCE), self._places.split(AT_ONCE), strict=True):
            yield from zip(steps.tolist(), places.tolist(), strict=True)

    def _line(self, step: int, place: int) -> Line | None:
        if place != self._at:
            self._file.seek(place)
        text = self._file.readline(MAX_LINE_BYTES)
        self._at, line = place + len(text), parse_line(text)
        if line is not None and line["step"] == step:
            return line
        self.unreadable += 1
        if place == self._end:
            self._leave_out_last()
        return None

    def _leave_out_last(self) -> None:
        self.unreadable, self.cut_off = self.unreadable - 1, True


def _step_of(text: bytes) -> int | None:
    """Return the step that a line begins with, or the whole line has; None if it has none."""
    if found := _STEP.match(text):
        return int(found[1]) if abs(int(found[1])) < MOST_STEP else None
    line = parse_line(text)
    return None if line is None else int(line["step"])
