"""A chart as inline SVG: lines in the colours of their runs, with markers that say their value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from fp16_patch.mismatch.report.axis import Axis
from fp16_patch.mismatch.report.comparison import number_text

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 10, 44
SLANTED_BOTTOM = 78
MARKED_POINTS = 60
FINE_POINTS = 150
DRAWN_POINTS = 600
HOVER_POINTS = 180
COLOURS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One run's values along x, in the colour and marker of ``style``, and in its dash unless ``dash`` is given."""

    name: str
    style: int
    points: dict[float, float]
    dash: str | None = None


@dataclass(frozen=True)
class Chart:
    """Lines on two axes. ``extras`` is SVG that a kind of chart draws besides them, such as bands and skip marks."""

    title: str
    lines: list[Line]
    x: Axis
    y: Axis
    caption: str = ""
    extras: str = ""

    @property
    def bottom(self) -> int:
        """The room below the axis; names of categories are slanted, and need more of it."""
        return SLANTED_BOTTOM if self.x.texts else BOTTOM


def x_place(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def y_place(axis: Axis, value: float, bottom: int = BOTTOM) -> float:
    return HEIGHT - bottom - axis.share(value) * (HEIGHT - bottom - TOP)


def colour(style: int) -> str:
    """The class that gives an element the colour of a run."""
    return f"s{style % COLOURS}"


def figure(chart: Chart) -> str:
    """The chart with its title, caption and legend."""
    styles = {line.name: line.style for line in chart.lines}
    hovered = max(MARKED_POINTS // 2, HOVER_POINTS // max(1, len(chart.lines)))
    lines = "".join(_line(chart, line, hovered) for line in chart.lines)
    return (
        f"<figure><figcaption>{heading(chart.title, chart.caption)}{legend(styles)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
        f"{_grid(chart)}{chart.extras}{lines}</svg></figure>"
    )


def heading(title: str, caption: str = "") -> str:
    return f"<h3>{escape(title)}</h3>" + (f"<p>{escape(caption)}</p>" if caption else "")


def legend(styles: dict[str, int]) -> str:
    keys = "".join(f"<span>{_legend_key(style)}{escape(name)}</span>" for name, style in styles.items())
    return f'<div class="legend">{keys}</div>'


def _legend_key(style: int) -> str:
    line = f'<line class="line {colour(style)}" x1="0" x2="26" y1="6" y2="6"{_dash_attribute(_dash(style))}/>'
    mark = f'<path class="mark {colour(style)}" d="{_marker(style, 13, 6)}"/>'
    return f'<svg class="key" viewBox="0 0 26 12" aria-hidden="true">{line}{mark}</svg>'


def _grid(chart: Chart) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - chart.bottom
    middle = (TOP + bottom) / 2
    parts = [_y_tick(chart, tick, right) for tick in chart.y.ticks]
    parts += [_x_tick(chart, tick, bottom) for tick in chart.x.ticks]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="label" x="{(LEFT + right) / 2}" y="{HEIGHT - 6}">{escape(chart.x.label)}</text>')
    parts.append(f'<text class="label" transform="translate(13 {middle}) rotate(-90)">{escape(chart.y.label)}</text>')
    return "".join(parts)


def _y_tick(chart: Chart, tick: float, right: int) -> str:
    y = y_place(chart.y, tick, chart.bottom)
    text = f'<text class="y" x="{LEFT - 7}" y="{y + 4:.1f}">{chart.y.tick_text(tick)}</text>'
    return f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>{text}'


def _x_tick(chart: Chart, tick: float, bottom: int) -> str:
    x, text = x_place(chart.x, tick), escape(chart.x.tick_text(tick))
    line = f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
    if chart.x.texts:
        return f'{line}<text class="y" transform="translate({x + 4:.1f} {bottom + 15}) rotate(-35)">{text}</text>'
    return f'{line}<text class="x" x="{x:.1f}" y="{bottom + 17}">{text}</text>'


def _line(chart: Chart, line: Line, hovered: int) -> str:
    points = [(x, y) for x, y in line.points.items() if y > 0 or not chart.y.base]
    if not points:
        return ""
    drawn = thinned(points, DRAWN_POINTS)
    path = " ".join(f"{x_place(chart.x, x):.1f},{y_place(chart.y, y, chart.bottom):.1f}" for x, y in drawn)
    dash = _dash(line.style) if line.dash is None else line.dash
    width = "line fine" if len(points) > FINE_POINTS else "line"
    polyline = f'<polyline class="{width} {colour(line.style)}" points="{path}"{_dash_attribute(dash)}/>'
    return polyline + _marks(chart, line, points, hovered)


def thinned(points: Points, most: int) -> Points:
    """At most about ``most`` points: of each stretch its least and its greatest, so that spikes stay."""
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


def _marks(chart: Chart, line: Line, points: Points, hovered: int) -> str:
    """Markers with the value as their title; on a long line of a few points only, and seen under the pointer only."""
    if len(points) <= MARKED_POINTS:
        return "".join(_mark(chart, line, point, _marker(line.style, *_place(chart, point))) for point in points)
    shown = thinned(points, hovered)
    return "".join(_mark(chart, line, point, _dot(*_place(chart, point)), "quiet ") for point in shown)


def _place(chart: Chart, point: tuple[float, float]) -> tuple[float, float]:
    return x_place(chart.x, point[0]), y_place(chart.y, point[1], chart.bottom)


def _mark(chart: Chart, line: Line, point: tuple[float, float], path: str, kind: str = "") -> str:
    title = escape(f"{line.name}, {_at(chart.x, point[0])}: {number_text(point[1])}")
    return f'<path class="mark {kind}{colour(line.style)}" d="{path}"><title>{title}</title></path>'


def _at(axis: Axis, value: float) -> str:
    return axis.tick_text(value) if axis.texts else f"{axis.label} {number_text(value)}"


def _dot(x: float, y: float) -> str:
    return f"M{x - 4:.0f} {y:.0f}a4 4 0 1 0 8 0a4 4 0 1 0-8 0"


def _marker(style: int, x: float, y: float, radius: float = 3.4) -> str:
    wide, tall, side = 1.25 * radius, 2.2 * radius, 1.35 * radius
    shapes = (
        f"M{x - radius:.1f} {y:.1f}a{radius} {radius} 0 1 0 {2 * radius} 0a{radius} {radius} 0 1 0 {-2 * radius} 0z",
        f"M{x - radius:.1f} {y - radius:.1f}h{2 * radius}v{2 * radius}h{-2 * radius}z",
        f"M{x:.1f} {y - 1.3 * radius:.1f}l{wide:.2f} {tall:.2f}h{-2 * wide:.2f}z",
        f"M{x:.1f} {y - side:.1f}l{side:.2f} {side:.2f}l{-side:.2f} {side:.2f}l{-side:.2f} {-side:.2f}z",
    )
    return shapes[style % len(shapes)]


def _dash(style: int) -> str:
    return DASHES[style // COLOURS % len(DASHES)]


def _dash_attribute(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def band(x: Axis, y: Axis, low: Line, high: Line) -> str:
    """The area between two lines, where both have a point."""
    steps = sorted(low.points.keys() & high.points.keys())
    kept = steps[:: math.ceil(len(steps) / DRAWN_POINTS) or 1]
    outline = [*_along(high, kept), *_along(low, reversed(kept))]
    points = " ".join(f"{x_place(x, step):.1f},{y_place(y, value):.1f}" for step, value in outline)
    return f'<polygon class="band {colour(low.style)}" points="{points}"/>'


def _along(line: Line, steps: Iterable[float]) -> list[tuple[float, float]]:
    return [(step, line.points[step]) for step in steps]
