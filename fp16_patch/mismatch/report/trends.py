"""Charts of the runs over their steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape

from fp16_patch.mismatch.record.reading import REWARDS, RunRecord, Runs
from fp16_patch.mismatch.report.axis import Axis, decade_axis, linear_axis, octave_axis
from fp16_patch.mismatch.report.comparison import number_text
from fp16_patch.mismatch.report.figure import LEFT, RIGHT, WIDTH, Chart, Line, band, colour, x_place, y_place
from fp16_patch.mismatch.statistics.summary import MismatchStats

AxisOf = Callable[[str, list[float]], Axis]


def trend_charts(runs: Runs) -> list[Chart]:
    """The charts that have something to show."""
    candidates = [
        _gap_chart(runs),
        _spread_chart(runs),
        _series_chart(runs, "Mean |Σd| of a sequence", ["mismatch/seq_mean_abs"], "mean |Σd| (nats)", decade_axis),
        _series_chart(runs, "k1 = mean(−d)", ["mismatch/k1"], "k1 (nats)", linear_axis),
        _series_chart(runs, "k3 = mean(r − 1 − d)", ["mismatch/k3"], "k3 (nats)", decade_axis),
        _series_chart(runs, "Effective sample size of a token", ["mismatch/ess"], "(Σr)² / nΣr²", linear_axis),
        _coverage_chart(runs),
        _series_chart(runs, "Reward", REWARDS, "mean score", linear_axis),
        _series_chart(runs, "Gradient norm of the actor", ["actor/grad_norm"], "gradient norm", _linear_or_decades),
        _loss_scale_chart(runs),
    ]
    return [chart for chart in candidates if chart is not None]


def _series_chart(runs: Runs, title: str, metrics: Sequence[str], label: str, y_axis: AxisOf) -> Chart | None:
    """Each run's values of the first of ``metrics`` that it recorded."""
    lines = [Line(name, style, _points(run, metrics)) for style, (name, run) in enumerate(runs.items())]
    return _chart(title, lines, label, y_axis)


def _chart(title: str, lines: Sequence[Line], label: str, y_axis: AxisOf) -> Chart | None:
    drawn = [line for line in lines if line.points]
    values = [value for line in drawn for value in line.points.values()]
    if not values or (y_axis is decade_axis and max(values) <= 0):
        return None
    return Chart(title, drawn, _step_axis(drawn), y_axis(label, values))


def _points(run: RunRecord, metrics: Sequence[str]) -> dict[float, float]:
    series = next((series for metric in metrics if (series := run.series(metric))), {})
    return {float(step): value for step, value in series.items()}


def _step_axis(lines: Sequence[Line]) -> Axis:
    return linear_axis("step", [step for line in lines for step in line.points], snug=True, whole=True)


def _linear_or_decades(label: str, values: list[float]) -> Axis:
    wide = min(values) > 0 and max(values) > 100 * min(values)
    return decade_axis(label, values) if wide else linear_axis(label, values)


def _gap_chart(runs: Runs) -> Chart | None:
    """Mean |d|, and below it how far the learner is from itself: what no dtype of the sampler can undercut."""
    floors = {style: floor for style, run in enumerate(runs.values()) if (floor := _floor(run.noise_floor)) > 0}

    def with_floors(label: str, values: list[float]) -> Axis:
        return decade_axis(label, [*values, *floors.values()])

    axis = with_floors if floors else decade_axis
    chart = _series_chart(runs, "Mean |d| of a token", ["mismatch/mean_abs"], "mean |d| (nats)", axis)
    if chart is None or not floors:
        return chart
    drawn = "".join(_floor_line(chart, style, floor) for style, floor in floors.items())
    return replace(chart, extras=drawn, caption="Dotted: the learner against itself, alone and in a batch.")


def _floor(stats: MismatchStats | None) -> float:
    return stats.d_abs_sum / stats.finite_tokens if stats is not None and stats.finite_tokens else 0.0


def _floor_line(chart: Chart, style: int, floor: float) -> str:
    y = y_place(chart.y, floor)
    return (
        f'<line class="floor {colour(style)}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}">'
        f"<title>learner against learner: {number_text(floor)}</title></line>"
    )


def _spread_chart(runs: Runs) -> Chart | None:
    """The band from the median to p99.9, clipped at the bottom where the median is zero."""
    middle, top = (
        [Line(name, style, _points(run, [metric]), dash) for style, (name, run) in enumerate(runs.items())]
        for metric, dash in (("mismatch/abs_p50", None), ("mismatch/abs_p99_9", "5 3"))
    )
    chart = _chart("Spread of |d|, p50 to p99.9", [*middle, *top], "|d| (nats)", decade_axis)
    if chart is None:
        return None
    bands = "".join(band(chart.x, chart.y, low, high) for low, high in zip(middle, top, strict=True))
    caption = "Solid: the median; dashed: p99.9, exceeded by one token in a thousand."
    return replace(chart, caption=caption, extras=bands)


def _coverage_chart(runs: Runs) -> Chart | None:
    """The share of the sampled tokens that was measured; no chart where every step was measured whole."""
    lines = [Line(name, style, _coverage(run)) for style, (name, run) in enumerate(runs.items())]
    if all(share == 1 for line in lines for share in line.points.values()):
        return None
    chart = _chart("Coverage", lines, "tokens measured / sampled", linear_axis)
    return chart and replace(chart, caption="The share of a step's sampled tokens that was measured.")


def _coverage(run: RunRecord) -> dict[float, float]:
    shares = {float(step): part.share() for step, part in run.coverage.items()}
    return {step: share for step, share in shares.items() if math.isfinite(share)}


def _loss_scale_chart(runs: Runs) -> Chart | None:
    chart = _series_chart(runs, "Loss scale", ["fp16/loss_scale"], "loss scale", octave_axis)
    if chart is None:
        return None
    skips = "".join(
        _skip_mark(chart, line, step)
        for line in chart.lines
        for step, skipped in runs[line.name].series("fp16/step_skipped").items()
        if skipped > 0 and step in line.points
    )
    caption = "× marks a skipped step: a gradient overflowed, the weights stayed." if skips else "No step was skipped."
    return replace(chart, caption=caption, extras=skips)


def _skip_mark(chart: Chart, line: Line, step: int) -> str:
    value = line.points[step]
    x, y = x_place(chart.x, step), y_place(chart.y, value) - 11
    return (
        f'<g class="skip {colour(line.style)}">'
        f"<title>{escape(line.name)}, step {step}: skipped at {number_text(value)}</title>"
        f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/></g>'
    )
