"""Charts as Plotly figures: what is drawn of the data, in which colours, on which axes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

pytest.importorskip("plotly")

from fp16_patch.mismatch.report.charts import (
    Axis,
    Chart,
    Heatmap,
    Level,
    Line,
    Scale,
    power_text,
    powers_of_two,
    thinned,
)
from fp16_patch.mismatch.report.plotly_figures import COLOURS, figure

LIGHT, DARK = "#ffffff", "#191c21"
# Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# severity 1, on linear RGB.
VISION = {
    "usual": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def drawn(chart: Chart | Heatmap) -> dict[str, Any]:
    content: dict[str, Any] = figure(chart).to_plotly_json()
    return content


def chart_of(values: list[float], scale: Scale = "log", runs: int = 1, **more: Any) -> Chart:
    points = {float(step): value for step, value in enumerate(values)}
    return Chart("x", [Line(f"run {run}", run, points) for run in range(runs)], Axis("step"), Axis("y", scale), **more)


def test_thinning_keeps_the_spikes() -> None:
    points = [(float(step), 1.0) for step in range(5000)]
    points[1234], points[4321] = (1234.0, 9.0), (4321.0, -9.0)
    kept = thinned(points, 100)

    assert len(kept) <= 100
    assert {points[1234], points[4321]} <= {*kept}
    assert [*kept] == sorted(kept)


def test_the_points_of_many_long_runs_are_few() -> None:
    figures = [drawn(chart_of([1.0 + step % 7 for step in range(10_000)], runs=runs)) for runs in (1, 8)]

    assert [max(len(trace["x"]) for trace in each["data"]) for each in figures] == [1000, 300]


def test_what_has_no_place_on_a_logarithmic_axis_is_left_out() -> None:
    (trace,) = drawn(chart_of([0.0, 2.0, 3.0]))["data"]

    assert ([*trace["x"]], [*trace["y"]]) == ([1, 2], [2.0, 3.0])


@pytest.mark.parametrize(
    ("scale", "values", "both"),
    [("log", [0.0, 2.0], True), ("log2", [4.0], True), ("linear", [1.0, 2.0], True), ("linear", [0.0, 2.0], False)],
)
def test_a_scale_that_would_hide_a_value_is_not_offered(scale: Scale, values: list[float], both: bool) -> None:
    assert chart_of(values, scale).has_both_scales is both


def test_a_band_is_clipped_where_its_lower_line_is_zero() -> None:
    low, high = Line("run", 0, {1.0: 0.0, 2.0: 2e-3}, detail="p50"), Line("run", 0, {1.0: 1e-2, 2.0: 2e-2})
    band, *_ = drawn(Chart("x", [low, high], Axis("step"), Axis("y", "log"), bands=((low, high),)))["data"]

    assert [*zip(band["x"], band["y"], strict=True)] == [(1, 1e-2), (2, 2e-2), (2, 2e-3), (1, 1e-3)]
    assert (band["fill"], band["hoverinfo"]) == ("toself", "skip")


def test_each_trace_is_of_a_run_and_each_run_once_in_the_legend() -> None:
    chart = chart_of([1.0, 2.0], runs=2, levels=(Level("run 1", 1, 0.5, "floor"),))
    traces = drawn(chart)["data"]

    # What the page's script switches off: by these names.
    assert [trace["legendgroup"] for trace in traces] == ["run 0", "run 1", "run 1"]
    assert [trace.get("showlegend") for trace in traces] == [True, True, False]


def test_names_are_text() -> None:
    (trace,) = drawn(Chart("x", [Line("<b>run</b>", 0, {1.0: 1.0})], Axis("<i>"), Axis("y")))["data"]

    assert trace["name"] == "&lt;b&gt;run&lt;/b&gt;"
    assert trace["legendgroup"] == "<b>run</b>"


def test_ticks_of_a_loss_scale_are_powers_of_two() -> None:
    axis = drawn(chart_of([65536.0], "log2"))["layout"]["yaxis"]

    assert [*axis["ticktext"]] == ["2¹⁵", "2¹⁶", "2¹⁷"]
    assert [*axis["tickvals"]] == [2.0**15, 2.0**16, 2.0**17]
    assert power_text(10, -12) == "10⁻¹²"
    assert len(powers_of_two([2.0**-10, 2.0**40])) <= 8


def test_categories_keep_their_order() -> None:
    chart = Chart(
        "x", [Line("run", 0, {0.0: 1.0, 2.0: 3.0})], Axis("place", "category", ("first", "1", "last")), Axis("y")
    )
    content = drawn(chart)

    assert [*content["data"][0]["x"]] == ["first", "last"]
    assert [*content["layout"]["xaxis"]["categoryarray"]] == ["first", "1", "last"]


@pytest.mark.parametrize(("last", "tick"), [(6, 1), (100, None)])
def test_steps_are_whole(last: int, tick: int | None) -> None:
    chart = Chart("x", [Line("run", 0, {1.0: 1.0, float(last): 1.0})], Axis("step", whole=True), Axis("y"))

    assert drawn(chart)["layout"]["xaxis"].get("dtick") == tick


def test_a_heat_map_has_every_cell_in_its_shade() -> None:
    counts = [[0] * 4 for _ in range(4)]
    counts[0][0], counts[1][0], counts[3][3] = 1_000_000, 1_000_000, 1
    cells = ["a", "b", "c", "d"]
    heatmap = Heatmap("run", 0, "", counts, "x", "y", cells, cells, [(0.0, "0"), (1.0, "1")], [], (0, 0, 1, 1))
    content = drawn(heatmap)
    (trace,) = content["data"]

    # From the fullest cells to those with one count; rows go upwards.
    assert (trace["zmin"], trace["zmax"]) == (0, 6)
    assert [*trace["z"][0]] == [6, 6, None, None]
    assert [*trace["z"][3]] == [None, None, None, 0]
    assert trace["text"][0][1] == "x: b<br>y: a<br><b>1\u202f000\u202f000</b>"
    assert [*content["layout"]["xaxis"]["tickvals"]] == [-0.5, 3.5]
    (guide,) = content["layout"]["shapes"]
    assert (guide["x0"], guide["y0"], guide["x1"], guide["y1"]) == (-0.5, -0.5, 3.5, 3.5)


def test_colours_are_told_apart_by_everybody() -> None:
    for matrix in VISION.values():
        seen = [_lab(_seen(matrix, _linear_rgb(colour))) for colour in COLOURS]
        assert min(math.dist(*pair) for pair in itertools.combinations(seen, 2)) > 10


@pytest.mark.parametrize("background", [LIGHT, DARK])
def test_colours_stand_out_from_the_page(background: str) -> None:
    # Of graphics, WCAG 2.1 asks for 3 to 1.
    assert min(_contrast(colour, background) for colour in COLOURS) >= 3


def _contrast(colour: str, background: str) -> float:
    low, high = sorted((_luminance(colour), _luminance(background)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), _linear_rgb(colour), strict=True))


def _linear_rgb(colour: str) -> list[float]:
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def _seen(matrix: Any, rgb: list[float]) -> list[float]:
    mixed = (sum(share * value for share, value in zip(row, rgb, strict=True)) for row in matrix)
    return [min(1.0, max(0.0, value)) for value in mixed]


def _lab(rgb: list[float]) -> tuple[float, float, float]:
    """CIELAB of linear sRGB, white D65."""
    rows = ((0.4125, 0.3576, 0.1804), (0.2127, 0.7152, 0.0722), (0.0193, 0.1192, 0.9503))
    white = (0.9505, 1.0, 1.0888)
    parts = [sum(a * b for a, b in zip(row, rgb, strict=True)) / w for row, w in zip(rows, white, strict=True)]
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in parts)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)
