"""Holds the mismatch by step in bounded memory: of many steps, those that follow each other are measured together."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping

import torch

from fp16_patch.mismatch.statistics.summary import MismatchStats

MOST_STRETCHES = 2000
"""Of so many steps each is measured by itself."""

FIRST_STEPS = 500
"""Of a longer training these are, too: what stale weights or a bad start do, they do early."""

HELD_NUMBERS = 1 << 16


class StepStretches(Mapping[int, MismatchStats]):
    """Stretch → its mismatch, by the stretch's first step and in the order of steps; each packed, in a few KB.

    At first a stretch is one step. Where there are more than ``MOST_STRETCHES``, those from step ``FIRST_STEPS`` on
    become twice as long.

    Attributes:
        width: how many steps a stretch is long, from ``FIRST_STEPS`` on.
    """

    def __init__(self) -> None:
        self.width = 1
        self._packed: dict[int, bytes] = {}

    def stretch_of(self, step: int) -> int:
        """Return the first step of the stretch in which a step lies."""
        return step if 0 <= step < FIRST_STEPS else step // self.width * self.width

    def add(self, stretch: int, stats: MismatchStats) -> None:
        there = self._packed.get(stretch)
        self._packed[stretch] = (stats if there is None else MismatchStats.from_bytes(there) + stats).to_bytes()

    def widen(self) -> None:
        """Make the stretches twice as long."""
        self.width *= 2
        packed, self._packed = self._packed, {}
        for stretch, message in packed.items():
            whole = self.stretch_of(stretch)
            if whole in self._packed:
                self.add(whole, MismatchStats.from_bytes(message))
            else:
                self._packed[whole] = message

    def __getitem__(self, stretch: int) -> MismatchStats:
        return MismatchStats.from_bytes(self._packed[stretch])

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._packed))

    def __len__(self) -> int:
        return len(self._packed)


class StepNumbers:
    """The distinct numbers of steps, in 8 bytes each."""

    def __init__(self) -> None:
        self._sorted = torch.empty(0, dtype=torch.int64)
        self._new: set[int] = set()

    def add(self, step: int) -> None:
        self._new.add(step)
        if len(self._new) == HELD_NUMBERS:
            self._sort()

    def sorted(self) -> array[int]:
        self._sort()
        numbers = array("q", bytes(8 * len(self._sorted)))
        if numbers:
            torch.frombuffer(numbers, dtype=torch.int64).copy_(self._sorted)
        return numbers

    def _sort(self) -> None:
        self._sorted = torch.cat([self._sorted, torch.tensor([*self._new], dtype=torch.int64)]).unique()
        self._new.clear()
