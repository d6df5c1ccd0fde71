"""Holds the metrics of a run by step, in memory that does not grow with the steps."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

EXACT_STEPS = 2048
"""Of so many steps every value is kept. Of more, the least and the greatest of each stretch of them."""

ROWS_AT_ONCE = 1024
MOST_METRICS = 1000


class StepMetrics(Collection[int]):
    """The steps in ascending order, and series of their metrics.

    Of a run with more than ``EXACT_STEPS`` steps a series has, of each stretch of steps, the least and the greatest
    value, and of all steps the first and the last one: at most ``2 * EXACT_STEPS + 2`` points. A stretch is 2, 4, 8, …
    steps, as long as it has to be. Of the steps' numbers all are kept, in 8 bytes each.

    Attributes:
        left_out: names of metrics beyond ``MOST_METRICS``, at most as many again.
    """

    def __init__(self) -> None:
        self.left_out: set[str] = set()
        self._numbers = array("q")
        self._columns: dict[str, int] = {}
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        self._stretches: list[_Stretches] = []
        self._halvings = 0
        self._first: dict[int, tuple[int, float]] = {}
        self._last: dict[int, tuple[int, float]] = {}

    @classmethod
    def of(cls, rows: Mapping[int, Mapping[str, float]], numbers: Sequence[int] = ()) -> StepMetrics:
        """Take step → metrics; ``numbers`` are the steps in their order, where a row stands for several."""
        steps = cls()
        for step in sorted(rows):
            steps.add(step, rows[step])
        steps._numbers = array("q", numbers) if numbers else steps._numbers
        return steps

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a step, which is later than the one before."""
        self._numbers.append(step)
        self._waiting.append((step, metrics))
        if len(self._waiting) == ROWS_AT_ONCE:
            self._fold()

    def series(self, metric: str) -> dict[int, float]:
        """Return the metric's finite values by step, in the order of steps."""
        self._fold()
        column = self._columns.get(metric)
        if column not in self._first:
            return {}
        points = dict([self._first[column], self._last[column]])
        for stretches in self._stretches:
            points |= stretches.points(column)
        return dict(sorted(points.items()))

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, step: object) -> bool:
        place = bisect_left(self._numbers, step) if isinstance(step, int) else len(self._numbers)
        return place < len(self._numbers) and self._numbers[place] == step

    def _fold(self) -> None:
        """Take the steps that wait into the series."""
        if not self._waiting:
            return
        for _, metrics in self._waiting:
            if not metrics.keys() <= self._columns.keys():
                self._name(metrics)
        steps = [step for step, _ in self._waiting]
        rows = [[metrics.get(name, math.nan) for name in self._columns] for _, metrics in self._waiting]
        self._waiting.clear()
        values = torch.tensor(rows, dtype=torch.float64).view(len(steps), len(self._columns))
        self._remember_ends(steps, rows, values.isfinite())
        stretches = _Stretches.of(torch.tensor(steps, dtype=torch.float64), values)
        for _ in range(self._halvings):
            stretches = stretches.halved()
        self._stretches.append(stretches)
        while sum(map(len, self._stretches)) > EXACT_STEPS:
            self._stretches = [_joined(self._stretches).halved()]
            self._halvings += 1

    def _name(self, metrics: Mapping[str, float]) -> None:
        """Give each new metric a column, while there are any."""
        for name in metrics:
            if len(self._columns) < MOST_METRICS:
                self._columns.setdefault(name, len(self._columns))
            elif name not in self._columns and len(self.left_out) < MOST_METRICS:
                self.left_out.add(name)

    def _remember_ends(self, steps: Sequence[int], rows: Sequence[Sequence[float]], is_there: Tensor) -> None:
        places = torch.arange(len(steps))[:, None]
        first, last = places.where(is_there, len(steps)).amin(0), places.where(is_there, -1).amax(0)
        for column, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            if high >= 0:
                self._first.setdefault(column, (steps[low], rows[low][column]))
                self._last[column] = (steps[high], rows[high][column])


@dataclass(frozen=True)
class _Stretches:
    """The least and the greatest value of each metric in each stretch of steps.

    Both are float64 of shape (2, stretches, metrics): steps, and values. A value that is not there is NaN.
    """

    least: Tensor
    greatest: Tensor

    @classmethod
    def of(cls, steps: Tensor, values: Tensor) -> _Stretches:
        """Take each row for a stretch."""
        points = torch.stack([steps[:, None].expand_as(values), values.where(values.isfinite(), math.nan)])
        return cls(points, points)

    def __len__(self) -> int:
        return len(self.least[0])

    def halved(self) -> _Stretches:
        """Join the stretches two by two."""
        return _Stretches(_pairs(self.least, torch.lt), _pairs(self.greatest, torch.gt))

    def points(self, column: int) -> dict[int, float]:
        if column >= self.least.shape[2]:
            return {}
        steps, values = torch.cat([self.least[:, :, column], self.greatest[:, :, column]], dim=1)
        is_there = ~values.isnan()
        return dict(zip(map(int, steps[is_there].tolist()), values[is_there].tolist(), strict=True))


def _pairs(points: Tensor, is_beyond: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of each two stretches keep the later one's point if it is beyond the earlier one's, or alone."""
    earlier, later = pad(points, (0, 0, 0, points.shape[1] % 2), value=math.nan).unflatten(1, (-1, 2)).unbind(2)
    return later.where(is_beyond(later[1], earlier[1]) | earlier[1].isnan(), earlier)


def _joined(parts: Sequence[_Stretches]) -> _Stretches:
    """Put stretches one after the other; the later ones may know of more metrics."""
    metrics = max(part.least.shape[2] for part in parts)
    least, greatest = (
        torch.cat([pad(points, (0, metrics - points.shape[2]), value=math.nan) for points in side], dim=1)
        for side in ([part.least for part in parts], [part.greatest for part in parts])
    )
    return _Stretches(least, greatest)
