"""What charts show, as data: lines on two axes, or a density over two. Nothing here draws."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

LEAST_EXPONENT, GREATEST_EXPONENT = sys.float_info.min_exp - 1, sys.float_info.max_exp - 1
"""Of two, in a float."""

Scale = Literal["linear", "log", "log2", "category"]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A labelled scale.

    Attributes:
        names: of categories, which lie at 0, 1, 2, …
        whole: only integers lie on it.
    """

    label: str
    scale: Scale = "linear"
    names: tuple[str, ...] = ()
    whole: bool = False

    def shows(self, value: float) -> bool:
        """Return whether the value has a place on the axis: on a logarithmic one, only what is above 0."""
        return value > 0 or self.scale in ("linear", "category")


@dataclass(frozen=True)
class Line:
    """One run's values along x.

    Attributes:
        name: the run's, by which it is switched off.
        style: the run's number, which gives colour, marker and dash.
        dash: Plotly's name of a dash, where it is not the style's.
        detail: what the line shows of the run, where a run has several: "p99.9".
    """

    name: str
    style: int
    points: dict[float, float]
    dash: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Level:
    """A value of a run that is the same at every x; ``text`` says what it is."""

    name: str
    style: int
    value: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A place on a run's line at which something happened; ``text`` says what."""

    name: str
    style: int
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Lines on two axes. ``bands`` are areas between a lower and an upper line; ``digits`` is a d3 number format."""

    title: str
    lines: list[Line]
    x: Axis
    y: Axis
    caption: str = ""
    bands: tuple[tuple[Line, Line], ...] = ()
    levels: tuple[Level, ...] = ()
    marks: tuple[Mark, ...] = ()
    digits: str = ".3~g"

    @property
    def has_both_scales(self) -> bool:
        """Says whether the y axis may be switched between linear and logarithmic without hiding a value."""
        values = [value for line in self.lines for value in line.points.values()]
        return self.y.scale in ("log", "log2") or (bool(values) and min(values) > 0)


@dataclass(frozen=True)
class Heatmap:
    """Counts by cell, all drawn in one size: ``counts[x][y]``, x to the right, y upwards.

    Attributes:
        x_cells, y_cells: what each column and each row holds, for people to read.
        x_ticks, y_ticks: (place, text), places from 0 to 1 along the axis.
        guide: the straight line of no mismatch, from (x, y) to (x, y), as places along the axes.
    """

    name: str
    style: int
    caption: str
    counts: Sequence[Sequence[int]]
    x_label: str
    y_label: str
    x_cells: Sequence[str]
    y_cells: Sequence[str]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    guide: tuple[float, float, float, float]

    @property
    def title(self) -> str:
        return self.name


def power_text(base: int, exponent: int) -> str:
    """Write a power as 2¹⁶."""
    return f"{base}{str(exponent).translate(SUPERSCRIPTS)}"


def powers_of_two(values: Iterable[float]) -> list[int]:
    """Return at most eight exponents of two that enclose the values, evenly apart, with one to spare at each end."""
    exponents = [math.log2(value) for value in values if value > 0]
    first = max(LEAST_EXPONENT, math.floor(min(exponents)) - 1)
    last = min(GREATEST_EXPONENT, math.ceil(max(exponents)) + 1)
    return [*range(first, last + 1, math.ceil((last - first) / 7))]


def thinned(points: Points, most: int) -> Points:
    """Keep at most about ``most`` points: of each stretch its least and its greatest, so that spikes stay."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for first in range(0, len(points), stretch):
        part = points[first : first + stretch]
        kept += sorted({min(part, key=_height), max(part, key=_height)})
    return kept


def _height(point: tuple[float, float]) -> float:
    return point[1]
