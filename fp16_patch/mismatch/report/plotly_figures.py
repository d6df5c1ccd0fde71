"""Charts as Plotly figures: traces and axes here; fonts and grid, which follow the reader's theme, in `page.js`.

Every trace has its run's name as `legendgroup`, by which `page.js` switches a run off in all charts at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from fp16_patch.mismatch.report.charts import (
    Axis,
    Chart,
    Heatmap,
    Level,
    Line,
    Mark,
    power_text,
    powers_of_two,
    thinned,
)
from fp16_patch.mismatch.report.comparison import number_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Told apart under each of the three colour-vision deficiencies, and by 3 to 1 from a white and a nearly black page.
COLOURS = ("#1878b8", "#d55e00", "#009e73", "#b656fc", "#8b8aa0", "#7b6355")
SYMBOLS = ("circle", "square", "triangle-up", "diamond")
DASHES = ("solid", "longdash", "dot", "longdashdot")

MARKED_POINTS = 30
POINTS_A_CHART = 2400
LEAST_POINTS, MOST_POINTS = 100, 1000
"""A chart's lines share ``POINTS_A_CHART``, within these bounds: so the page stays small however many runs it shows."""

CHART_HEIGHT, MAP_HEIGHT = 300, 360
LEGEND_ROW, LEGEND_WIDTH, LEGEND_KEY, LEGEND_LETTER = 19, 300, 45, 7
EVERY_STEP = 10
WIDE_DECADES, SMALL = 3, 1e-3
TICK_DISTANCE = 0.085
FAINTEST = 0.14
LARGE = 2**53
NO_HOVER = {"hoverinfo": "skip", "showlegend": False}


def figure(chart: Chart | Heatmap) -> Figure:
    """Return the Plotly figure of a chart, without a template."""
    return _density(chart) if isinstance(chart, Heatmap) else _lines(chart)


def colour(style: int) -> str:
    """Return the colour of a run by its number."""
    return COLOURS[style % len(COLOURS)]


def dash(style: int) -> str:
    """Return the dash of a run by its number: another one once the colours are used up."""
    return DASHES[style // len(COLOURS) % len(DASHES)]


def symbol(style: int) -> str:
    """Return the marker of a run by its number."""
    return SYMBOLS[style % len(SYMBOLS)]


def _lines(chart: Chart) -> Figure:
    names = {line.name for line in chart.lines}
    most = max(LEAST_POINTS, min(MOST_POINTS, POINTS_A_CHART // max(1, len(names))))
    floor = _floor(chart)
    traces = [
        *(_band(low, high, most, floor) for low, high in chart.bands),
        *_line_traces(chart, most),
        *(_level(chart, level) for level in chart.levels),
        *_mark_traces(chart.marks),
    ]
    values = [y for line in chart.lines for y in line.points.values()] + [level.value for level in chart.levels]
    layout = {
        "height": CHART_HEIGHT + LEGEND_ROW * (_legend_rows(names) - 1),
        "hovermode": "x unified",
        "showlegend": len(names) > 1,
        "xaxis": _axis(chart.x, [x for line in chart.lines for x in line.points]),
        "yaxis": _axis(chart.y, values),
    }
    return _figure(traces, layout)


def _legend_rows(names: Iterable[str]) -> int:
    """Estimate in how many rows a legend lies over a chart, which is not to become lower by it."""
    return math.ceil(sum(LEGEND_KEY + LEGEND_LETTER * len(name) for name in names) / LEGEND_WIDTH) or 1


def _figure(traces: Iterable[dict[str, Any]], layout: dict[str, Any]) -> Figure:
    from plotly.graph_objects import Figure

    drawn = Figure([*traces], layout)
    drawn.layout.template = None
    return drawn


def _line_traces(chart: Chart, most: int) -> Iterable[dict[str, Any]]:
    """Draw each line; the first of each run stands in the legend."""
    listed: set[str] = set()
    for line in chart.lines:
        points = thinned([(x, y) for x, y in line.points.items() if chart.y.shows(y)], most)
        marked = len(points) <= MARKED_POINTS
        yield {
            **_of_run(line.name),
            "name": escape(line.name),
            "x": _places(chart.x, [x for x, _ in points]),
            "y": [_rounded(y) for _, y in points],
            "mode": "lines+markers" if marked else "lines",
            "line": {
                "color": colour(line.style),
                "width": 2 if marked else 1.6,
                "dash": line.dash or dash(line.style),
                "shape": "hv" if chart.y.scale == "log2" else "linear",
            },
            "marker": {"color": colour(line.style), "symbol": symbol(line.style), "size": 6},
            "hovertemplate": _hover(f"%{{y:{chart.digits}}}", f"{line.name} {line.detail}".strip()),
            "showlegend": line.name not in listed,
        }
        listed.add(line.name)


def _of_run(name: str) -> dict[str, Any]:
    return {"type": "scatter", "legendgroup": name}


def _hover(value: str, label: str) -> str:
    return f"{value}<extra>{escape(label)}</extra>"


def _places(axis: Axis, values: Sequence[float]) -> list[Any]:
    if axis.names:
        return [escape(axis.names[round(value)]) for value in values]
    return [_rounded(value) for value in values]


def _rounded(value: float) -> float:
    """Round to six significant digits, but for whole numbers: more would make the page larger and show nothing."""
    return int(value) if abs(value) < LARGE and float(value).is_integer() else float(f"{value:.6g}")


def _floor(chart: Chart) -> float:
    """Return the bottom of bands whose lower line has no place on a logarithmic axis."""
    values = [value for line in chart.lines for value in line.points.values() if value > 0]
    return 10.0 ** math.floor(math.log10(min(values))) if values and chart.y.scale == "log" else -math.inf


def _band(low: Line, high: Line, most: int, floor: float) -> dict[str, Any]:
    """Fill the area between two lines, where both have a point."""
    steps = sorted(low.points.keys() & high.points.keys())
    kept = steps[:: math.ceil(len(steps) / most) or 1]
    outline = [(x, high.points[x]) for x in kept] + [(x, low.points[x]) for x in reversed(kept)]
    return {
        **_of_run(low.name),
        **NO_HOVER,
        "x": [_rounded(x) for x, _ in outline],
        "y": [_rounded(max(y, floor)) for _, y in outline],
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": _shade(low.style, 0.16),
    }


def _level(chart: Chart, level: Level) -> dict[str, Any]:
    """Draw a straight line of many points, so that it answers wherever the reader points."""
    steps = sorted({x for line in chart.lines if line.name == level.name for x in line.points})
    kept = sorted({*steps[:: math.ceil(len(steps) / LEAST_POINTS)], steps[-1]})
    return {
        **_of_run(level.name),
        "name": escape(level.name),
        "x": _places(chart.x, kept),
        "y": [_rounded(level.value)] * len(kept),
        "mode": "lines",
        "line": {"color": colour(level.style), "width": 1.6, "dash": "dot"},
        "hovertemplate": _hover(f"%{{y:{chart.digits}}}", f"{level.name}, {level.text}"),
        "showlegend": False,
    }


def _mark_traces(marks: Sequence[Mark]) -> Iterable[dict[str, Any]]:
    for name in dict.fromkeys(mark.name for mark in marks):
        own = [mark for mark in marks if mark.name == name]
        yield {
            **_of_run(name),
            "name": escape(name),
            "x": [mark.x for mark in own],
            "y": [mark.y for mark in own],
            "text": [escape(mark.text) for mark in own],
            "mode": "markers",
            "marker": {"color": colour(own[0].style), "symbol": "x", "size": 11, "line": {"color": "#fff", "width": 1}},
            "hovertemplate": _hover("%{text}", name),
            "showlegend": False,
        }


def _axis(axis: Axis, values: Sequence[float]) -> dict[str, Any]:
    title = {"title": {"text": escape(axis.label)}}
    if axis.scale == "category":
        names = [escape(name) for name in axis.names]
        return {**title, "type": "category", "categoryorder": "array", "categoryarray": names}
    if axis.scale == "log":
        return {**title, "type": "log", **_decade_ticks([value for value in values if value > 0])}
    if axis.scale == "log2":
        exponents = powers_of_two(values)
        ticks = {"tickvals": [2.0**power for power in exponents], "ticktext": [power_text(2, p) for p in exponents]}
        return {**title, "type": "log", **ticks}
    few = axis.whole and values and max(values) - min(values) <= EVERY_STEP
    return {**title, "type": "linear", "exponentformat": "power", **({"dtick": 1} if few else {})}


def _decade_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Return powers of ten alone over a wide range; over a narrow one, numbers in full at 1, 2 and 5 of each decade."""
    decades = math.log10(max(values) / min(values)) if values else math.inf
    if decades > WIDE_DECADES:
        return {"exponentformat": "power"}
    return {"nticks": math.ceil(2 * decades) or 1, "tickformat": ".2~g" if min(values) >= SMALL else ".2~e"}


def _density(heatmap: Heatmap) -> Figure:
    """Shade each cell by the logarithm of its count; empty ones are blank."""
    columns, rows = len(heatmap.counts), len(heatmap.counts[0])
    fullest = max(max(column) for column in heatmap.counts)
    x1, y1, x2, y2 = heatmap.guide
    trace = {
        "type": "heatmap",
        "name": escape(heatmap.name),
        "z": [[_decades(column[row]) for column in heatmap.counts] for row in range(rows)],
        "zmin": 0,
        "zmax": max(1.0, math.log10(fullest)),
        "text": [
            [_cell_text(heatmap, place, row, column[row]) for place, column in enumerate(heatmap.counts)]
            for row in range(rows)
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": [[0, _shade(heatmap.style, FAINTEST)], [1, _shade(heatmap.style, 1)]],
        "colorbar": {**_count_ticks(fullest), "thickness": 8, "outlinewidth": 0, "len": 1.0, "ticklen": 3},
    }
    guide = {
        "type": "line",
        "x0": x1 * columns - 0.5,
        "y0": y1 * rows - 0.5,
        "x1": x2 * columns - 0.5,
        "y1": y2 * rows - 0.5,
        "line": {"color": "rgba(128,128,128,0.9)", "width": 1, "dash": "dash"},
    }
    layout = {
        "height": MAP_HEIGHT,
        "shapes": [guide],
        "xaxis": _cells_axis(heatmap.x_label, columns, _apart(heatmap.x_ticks, 2 * TICK_DISTANCE)),
        "yaxis": _cells_axis(heatmap.y_label, rows, _apart(heatmap.y_ticks, TICK_DISTANCE)),
    }
    return _figure([trace], layout)


def _decades(count: int) -> float | None:
    return round(math.log10(count), 3) if count else None


def _cell_text(heatmap: Heatmap, column: int, row: int, count: int) -> str:
    if not count:
        return ""
    place = f"{heatmap.x_label}: {heatmap.x_cells[column]}<br>{heatmap.y_label}: {heatmap.y_cells[row]}"
    return f"{place}<br><b>{number_text(count)}</b>"


def _count_ticks(fullest: int) -> dict[str, Any]:
    powers = range(math.floor(math.log10(fullest)) + 1)
    return {"tickvals": [*powers], "ticktext": [number_text(10**power) for power in powers]}


def _cells_axis(label: str, cells: int, ticks: Iterable[tuple[float, str]]) -> dict[str, Any]:
    shown = [*ticks]
    return {
        "title": {"text": escape(label)},
        "range": [-0.5, cells - 0.5],
        "tickvals": [place * cells - 0.5 for place, _ in shown],
        "ticktext": [text for _, text in shown],
        "showgrid": False,
        "zeroline": False,
    }


def _apart(ticks: Iterable[tuple[float, str]], distance: float) -> Iterable[tuple[float, str]]:
    """Leave out the ticks that would stand on the one before."""
    last = -math.inf
    for place, text in ticks:
        if place - last >= distance:
            yield place, text
            last = place


def _shade(style: int, opacity: float) -> str:
    red, green, blue = (int(colour(style)[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"
