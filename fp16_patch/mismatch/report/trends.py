"""Charts of the runs over their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fp16_patch.mismatch.record.coverage import SHARE
from fp16_patch.mismatch.record.reading import REWARDS, RunRecord, Runs
from fp16_patch.mismatch.report.charts import Axis, Chart, Level, Line, Mark, Scale
from fp16_patch.mismatch.report.comparison import number_text
from fp16_patch.mismatch.statistics.summary import MismatchStats

STEP = Axis("step", whole=True)
WIDE = 100

ScaleOf = Callable[[Sequence[float]], Scale]


def trend_charts(runs: Runs) -> list[Chart]:
    """Return the charts that have something to show."""
    candidates = [
        _gap_chart(runs),
        _spread_chart(runs),
        _series_chart(runs, "Mean |Σd| of a sequence", ["mismatch/seq_mean_abs"], "mean |Σd| (nats)", _log),
        _series_chart(runs, "k1 = mean(−d)", ["mismatch/k1"], "k1 (nats)", _linear),
        _series_chart(runs, "k3 = mean(r − 1 − d)", ["mismatch/k3"], "k3 (nats)", _log),
        _series_chart(runs, "Effective sample size of a token", ["mismatch/ess"], "(Σr)² / nΣr²", _linear),
        _coverage_chart(runs),
        _series_chart(runs, "Reward", REWARDS, "mean score", _linear),
        _series_chart(runs, "Gradient norm of the actor", ["actor/grad_norm"], "gradient norm", _log_if_wide),
        _loss_scale_chart(runs),
    ]
    return [chart for chart in candidates if chart is not None]


def _linear(values: Sequence[float]) -> Scale:
    return "linear"


def _log(values: Sequence[float]) -> Scale:
    return "log"


def _log2(values: Sequence[float]) -> Scale:
    return "log2"


def _log_if_wide(values: Sequence[float]) -> Scale:
    return "log" if min(values) > 0 and max(values) > WIDE * min(values) else "linear"


def _series_chart(runs: Runs, title: str, metrics: Sequence[str], label: str, scale: ScaleOf) -> Chart | None:
    """Draw each run's values of the first of ``metrics`` that it recorded."""
    lines = [Line(name, style, _points(run, metrics)) for style, (name, run) in enumerate(runs.items())]
    return _chart(title, lines, label, scale)


def _chart(title: str, lines: Sequence[Line], label: str, scale: ScaleOf) -> Chart | None:
    """Return None where no value has a place on the axis."""
    drawn = [line for line in lines if line.points]
    values = [value for line in drawn for value in line.points.values()]
    y = Axis(label, scale(values) if values else "linear")
    return Chart(title, drawn, STEP, y) if any(map(y.shows, values)) else None


def _points(run: RunRecord, metrics: Sequence[str]) -> dict[float, float]:
    series = next((series for metric in metrics if (series := run.series(metric))), {})
    return {float(step): value for step, value in series.items()}


def _gap_chart(runs: Runs) -> Chart | None:
    """Draw mean |d|, and how far the learner is from itself: no dtype of the sampler can undercut that."""
    chart = _series_chart(runs, "Mean |d| of a token", ["mismatch/mean_abs"], "mean |d| (nats)", _log)
    if chart is None:
        return None
    drawn = {line.name for line in chart.lines}
    levels = tuple(
        Level(name, style, floor, "learner against learner")
        for style, (name, run) in enumerate(runs.items())
        if (floor := _floor(run.noise_floor)) > 0 and name in drawn
    )
    caption = "Dotted: the learner against itself, alone and in a batch." if levels else ""
    return replace(chart, levels=levels, caption=caption)


def _floor(stats: MismatchStats | None) -> float:
    return stats.d_abs_sum / stats.finite_tokens if stats is not None and stats.finite_tokens else 0.0


def _spread_chart(runs: Runs) -> Chart | None:
    """Draw the band from the median to p99.9, clipped at the bottom where the median is zero."""
    middle, top = (
        [
            Line(name, style, _points(run, [f"mismatch/{metric}"]), dash, detail)
            for style, (name, run) in enumerate(runs.items())
        ]
        for metric, dash, detail in (("abs_p50", None, "p50"), ("abs_p99_9", "dash", "p99.9"))
    )
    chart = _chart("Spread of |d|, p50 to p99.9", [*middle, *top], "|d| (nats)", _log)
    if chart is None:
        return None
    bands = tuple(pair for pair in zip(middle, top, strict=True) if pair[0].points and pair[1].points)
    caption = "Solid: the median; dashed: p99.9, exceeded by one token in a thousand."
    return replace(chart, caption=caption, bands=bands)


def _coverage_chart(runs: Runs) -> Chart | None:
    """Draw the share of the sampled tokens that was measured; nothing where every step was measured whole."""
    lines = [Line(name, style, _points(run, [SHARE])) for style, (name, run) in enumerate(runs.items())]
    if all(share == 1 for line in lines for share in line.points.values()):
        return None
    chart = _chart("Coverage", lines, "tokens measured / sampled", _linear)
    return chart and replace(chart, caption="The share of a step's sampled tokens that was measured.")


def _loss_scale_chart(runs: Runs) -> Chart | None:
    chart = _series_chart(runs, "Loss scale", ["fp16/loss_scale"], "loss scale", _log2)
    if chart is None:
        return None
    skips = tuple(
        Mark(line.name, line.style, step, line.points[step], f"skipped at {number_text(line.points[step])}")
        for line in chart.lines
        for step, skipped in runs[line.name].series("fp16/step_skipped").items()
        if skipped > 0 and step in line.points
    )
    caption = "× marks a skipped step: a gradient overflowed, the weights stayed." if skips else "No step was skipped."
    return replace(chart, caption=caption, marks=skips, digits=",")
