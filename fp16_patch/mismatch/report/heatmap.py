"""A density over two axes as inline SVG: the darker a cell, the more of what is counted lies in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from fp16_patch.mismatch.report.comparison import number_text
from fp16_patch.mismatch.report.figure import colour, heading

SIDE = 300
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 8, 44
SHADES = (1.0, 0.76, 0.57, 0.43, 0.32, 0.24, 0.17)
"""Opacity, from the fullest cells to those with one count; each shade is the same factor below the one before."""

TICK_DISTANCE = 0.085

Levels = Sequence[Sequence[int | None]]
Ticks = Sequence[tuple[float, str]]
"""Places along an axis, from 0 to 1, and what stands there."""


@dataclass(frozen=True)
class Heatmap:
    """Counts by cell, of equal size: ``counts[x][y]``, x to the right, y upwards.

    ``guide`` is the straight line of no mismatch, from (x, y) to (x, y), as shares of the axes.
    """

    name: str
    style: int
    caption: str
    counts: Sequence[Sequence[int]]
    x_label: str
    y_label: str
    x_ticks: Ticks
    y_ticks: Ticks
    guide: tuple[float, float, float, float]


def heatmap_figure(heatmap: Heatmap) -> str:
    width, height = LEFT + SIDE + RIGHT, TOP + SIDE + BOTTOM
    fullest = max(max(column) for column in heatmap.counts)
    levels = [[_level(count, fullest) for count in column] for column in heatmap.counts]
    cells = "".join(_shade(levels, level, fullest / _factor(fullest) ** level) for level in range(len(SHADES)))
    label = escape(f"{heatmap.name}: {heatmap.y_label} against {heatmap.x_label}")
    return (
        f"<figure><figcaption>{heading(heatmap.name, heatmap.caption)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f'{_axes(heatmap)}<g class="heat {colour(heatmap.style)}" transform="translate({LEFT} {TOP})">{cells}</g>'
        f"{_guide(heatmap)}</svg></figure>"
    )


def _shade(levels: Levels, level: int, most: float) -> str:
    """All cells of one shade as one path, neighbours along x joined."""
    wide, tall = SIDE / len(levels), SIDE / len(levels[0])
    path = "".join(
        f"M{first * wide:.1f} {SIDE - (row + 1) * tall:.1f}h{count * wide:.1f}v{tall:.1f}h{-count * wide:.1f}z"
        for row in range(len(levels[0]))
        for first, count in _stretches([column[row] for column in levels], level)
    )
    title = f"up to {number_text(math.floor(most))} in a cell"
    return f'<path opacity="{SHADES[level]}" d="{path}"><title>{title}</title></path>' if path else ""


def _factor(fullest: int) -> float:
    """From shade to shade: so that all of them are used, but no less than 2."""
    return max(2.0, math.pow(fullest, 1 / (len(SHADES) - 1)))


def _level(count: int, fullest: int) -> int | None:
    """The index of the cell's shade; None for an empty one."""
    if not count:
        return None
    return min(len(SHADES) - 1, math.floor(math.log(fullest / count, _factor(fullest)) + 1e-9))


def _stretches(row: Sequence[int | None], level: int) -> Iterator[tuple[int, int]]:
    """(first, how many) of each stretch of cells of this level."""
    first = 0
    while first < len(row):
        last = first
        while last < len(row) and row[last] == level:
            last += 1
        if last > first:
            yield first, last - first
        first = last + 1


def _axes(heatmap: Heatmap) -> str:
    parts = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/>']
    for share, text in _apart(heatmap.x_ticks, 2 * TICK_DISTANCE):
        x = LEFT + share * SIDE
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + SIDE}" y2="{TOP + SIDE + 4}"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{TOP + SIDE + 17}">{escape(text)}</text>')
    for share, text in _apart(heatmap.y_ticks, TICK_DISTANCE):
        y = TOP + (1 - share) * SIDE
        parts.append(f'<line class="tick" x1="{LEFT - 4}" x2="{LEFT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 7}" y="{y + 4:.1f}">{escape(text)}</text>')
    middle = SIDE / 2
    parts.append(f'<text class="label" x="{LEFT + middle}" y="{TOP + SIDE + 38}">{escape(heatmap.x_label)}</text>')
    turned = f'transform="translate(13 {TOP + middle}) rotate(-90)"'
    parts.append(f'<text class="label" {turned}>{escape(heatmap.y_label)}</text>')
    return "".join(parts)


def _apart(ticks: Ticks, distance: float) -> Iterator[tuple[float, str]]:
    """The ticks without those that would stand on the one before."""
    last = -math.inf
    for share, text in ticks:
        if share - last >= distance:
            yield share, text
            last = share


def _guide(heatmap: Heatmap) -> str:
    x1, y1, x2, y2 = heatmap.guide
    ends = (LEFT + x1 * SIDE, TOP + (1 - y1) * SIDE, LEFT + x2 * SIDE, TOP + (1 - y2) * SIDE)
    return '<path class="guide" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>'.format(*ends)
