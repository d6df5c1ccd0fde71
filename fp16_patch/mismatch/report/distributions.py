"""Charts of where the gap lies: over its size, the probability of a token, its position, the length of a sequence."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fp16_patch.mismatch.diagnosis.drift import LagCurve
from fp16_patch.mismatch.record.reading import Runs
from fp16_patch.mismatch.report.charts import Axis, Chart, Heatmap, Line, power_text
from fp16_patch.mismatch.report.comparison import number_text, ratio
from fp16_patch.mismatch.statistics.by_lag import MOST_LAG
from fp16_patch.mismatch.statistics.summary import BINS_PER_DECADE, BINS_PER_SIGN, Band, MismatchStats, bin_edges

ROOM_FOR_ZERO = 0.04
NEAR_ONE = 0.01
Ticks = Sequence[tuple[float, str]]

NAMED_PROBABILITIES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)


def distribution_charts(runs: Runs) -> list[Chart]:
    """Return the charts that have something to show."""
    candidates = [
        _histogram_chart(runs),
        _band_chart(
            runs, "|d| by probability", "the sampler's probability of the token", MismatchStats.probability_bands
        ),
        _band_chart(runs, "|d| by position", "position in the sequence", MismatchStats.position_bands),
        _length_chart(runs),
        _lag_chart(runs),
    ]
    return [chart for chart in candidates if chart is not None]


def _histogram_chart(runs: Runs) -> Chart | None:
    """Draw the share of finite tokens in each sixth of a decade of |d|, from the merged histograms."""
    lines = [Line(name, style, _histogram_points(run.total())) for style, (name, run) in enumerate(runs.items())]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    zeros = ", ".join(f"{name} {_zero_share(run.total()):.2g} %" for name, run in runs.items() if run.total().tokens)
    caption = f"Share of tokens in each sixth of a decade. Below 1e-9, hence not drawn: {zeros}."
    return Chart("Distribution of |d|", lines, Axis("|d| (nats)", "log"), Axis("share of tokens", "log"), caption)


def _histogram_points(stats: MismatchStats, bins: int = BINS_PER_DECADE // 6) -> dict[float, float]:
    if not stats.finite_tokens:
        return {}
    counts = stats.abs_histogram()[1:].reshape(BINS_PER_SIGN // bins, bins).sum(dim=1)
    edges = bin_edges()[::bins]
    centres = (edges[:-1] * edges[1:]).sqrt()
    pairs = zip(centres.tolist(), counts.tolist(), strict=True)
    return {centre: count / stats.finite_tokens for centre, count in pairs if count}


def _zero_share(stats: MismatchStats) -> float:
    return 100 * ratio(int(stats.abs_histogram()[0]), stats.finite_tokens)


def _band_chart(runs: Runs, title: str, label: str, bands_of: Callable[[MismatchStats], list[Band]]) -> Chart | None:
    bands = {name: bands_of(run.total()) for name, run in runs.items()}
    starts = {band.label: band.low for each in bands.values() for band in each}
    texts = sorted(starts, key=lambda text: (math.isnan(starts[text]), starts[text]))
    means = [{float(texts.index(band.label)): band.d_abs_mean for band in each} for each in bands.values()]
    return _category_chart(title, label, texts, means, runs, "mean |d| (nats)")


def _length_chart(runs: Runs) -> Chart | None:
    bands = {name: run.total().by_length() for name, run in runs.items()}
    ranges = sorted({(band.low, band.high) for each in bands.values() for band in each})
    means = [{float(ranges.index((band.low, band.high))): band.mean_abs for band in each} for each in bands.values()]
    texts = [_range_text(low, high) for low, high in ranges]
    return _category_chart("|Σd| by length", "sampled tokens of the sequence", texts, means, runs, "mean |Σd| (nats)")


def _lag_chart(runs: Runs) -> Chart | None:
    """Draw mean |d| by the lag of the sampler's weights; nothing where every sample is fresh, or nobody knows."""
    curves = {name: LagCurve.of(run.by_lag) for name, run in runs.items()}
    if all(curve.is_fresh() for curve in curves.values()):
        return None
    lags = sorted({lag for curve in curves.values() for lag in curve.points})
    means = [{float(lags.index(lag)): point.mean_abs for lag, point in each.points.items()} for each in curves.values()]
    texts = [f"{lag}–" if lag == MOST_LAG else str(lag) for lag in lags]
    label = "lag: versions by which the sampler's weights are older than the learner's"
    return _category_chart("|d| by lag", label, texts, means, runs, "mean |d| (nats)")


def _range_text(low: float, high: float) -> str:
    if high - low <= 1:
        return f"{low:.0f}"
    return f"{low:.0f}–{high - 1:.0f}" if math.isfinite(high) else f"{low:.0f}–"


def _category_chart(
    title: str, x: str, texts: Sequence[str], points: Sequence[dict[float, float]], names: Iterable[str], y: str
) -> Chart | None:
    """Draw a line a run through the categories; nothing where there is no value above 0."""
    lines = [Line(name, style, points[style]) for style, name in enumerate(names) if points[style]]
    values = [value for line in lines for value in line.points.values()]
    if not any(value > 0 for value in values):
        return None
    return Chart(title, lines, Axis(x, "category", tuple(texts)), Axis(y, "log"))


def probability_maps(runs: Runs) -> list[Heatmap]:
    """Count the tokens by the sampler's and the learner's probability: Fig. 5 of arXiv 2510.26788 as a density.

    The axes are those of ``probability_edges``, cut to what is occupied in any of the runs, the same for all.
    """
    counts = _counted({name: run.total().joint_probability() for name, run in runs.items()})
    if not counts:
        return []
    together = torch.stack([*counts.values()]).sum(0)
    part = _occupied(together.sum(0) + together.sum(1))
    edges = MismatchStats.probability_edges()[part.start : part.stop + 1].tolist()
    ticks, cells = _probability_ticks(edges), _probability_cells(edges)
    return _maps(
        runs,
        counts,
        (part, part),
        "tokens; on the dashed line both agree.",
        x_label="sampler's probability",
        y_label="learner's probability",
        x_cells=cells,
        y_cells=cells,
        x_ticks=ticks,
        y_ticks=ticks,
        guide=(0, 0, 1, 1),
    )


def length_maps(runs: Runs) -> list[Heatmap]:
    """Count the sequences by the number of their tokens and by Σd, in the statistics' bins, the same for all runs."""
    counts = _counted({name: run.total().length_density() for name, run in runs.items()})
    if not counts:
        return []
    together = torch.stack([*counts.values()]).sum(0)
    lengths, sums = _occupied(together.sum(1)), _symmetric(_occupied(together.sum(0)), together.shape[1])
    x_edges = MismatchStats.length_edges()[lengths.start : lengths.stop + 1].tolist()
    y_edges = MismatchStats.sum_edges()[sums.start : sums.stop + 1].tolist()
    return _maps(
        runs,
        counts,
        (lengths, sums),
        "sequences; on the dashed line Σd is 0.",
        x_label="sampled tokens",
        y_label="Σd (nats)",
        x_cells=[_range_text(low, high) for low, high in pairwise(x_edges)],
        y_cells=[f"{_sum_text(low)} … {_sum_text(high)}" for low, high in pairwise(y_edges)],
        x_ticks=_edge_ticks(x_edges),
        y_ticks=_sum_ticks(y_edges),
        guide=(0, 0.5, 1, 0.5),
    )


def _maps(runs: Runs, counts: dict[str, Tensor], part: tuple[slice, slice], counted: str, **axes: Any) -> list[Heatmap]:
    """Return a map of each run that has counts, in the run's colour: this part of them, on the same axes."""
    return [
        Heatmap(
            name=name,
            style=style,
            caption=f"{number_text(int(counts[name].sum()))} {counted}",
            counts=counts[name][part].tolist(),
            **axes,
        )
        for style, name in enumerate(runs)
        if name in counts
    ]


def _counted(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those with something in them: records of earlier releases have neither table."""
    return {name: table for name, table in tables.items() if table.any()}


def _occupied(counts: Tensor) -> slice:
    """Return the bins from the first that is not empty to the last."""
    found = counts.nonzero().flatten().tolist()
    return slice(found[0], found[-1] + 1)


def _symmetric(part: slice, size: int) -> slice:
    """Return the smallest slice about the middle bin that has the part in it."""
    margin = min(part.start, size - part.stop)
    return slice(margin, size - margin)


def _probability_ticks(edges: Sequence[float]) -> Ticks:
    inside = [p for p in NAMED_PROBABILITIES if edges[0] <= p <= edges[-1]]
    return [(_share(edges, p), f"{p:g}") for p in inside]


def _share(edges: Sequence[float], value: float) -> float:
    """Return a value's place, 0 to 1, along bins drawn equally wide."""
    index = max(0, min(len(edges) - 2, bisect_right(edges, value) - 1))
    low, high = edges[index], edges[index + 1]
    return (index + (value - low) / (high - low)) / (len(edges) - 1)


def _probability_cells(edges: Sequence[float]) -> list[str]:
    """Write each bin as "0.82 – 0.9"; near 1, where the digits would not do, as "1 − 1e-4 – 1"."""
    return [f"{_near_one(low)} – {_near_one(high)}" for low, high in pairwise(edges)]


def _near_one(probability: float) -> str:
    rest = 1 - probability
    return f"1 − {rest:.1e}" if 0 < rest < NEAR_ONE else f"{probability:.2g}"


def _edge_ticks(edges: Sequence[float]) -> Ticks:
    return [(place / (len(edges) - 1), f"{edge:.0f}") for place, edge in enumerate(edges) if math.isfinite(edge)]


def _sum_ticks(edges: Sequence[float]) -> Ticks:
    """Mark powers of ten on either side of 0, which is the middle of the middle bin."""
    powers = [(place, edge) for place, edge in enumerate(edges) if _is_power_of_ten(abs(edge))]
    ticks = [(place / (len(edges) - 1), _power_text(edge)) for place, edge in powers]
    return sorted([*(tick for tick in ticks if abs(tick[0] - 0.5) > ROOM_FOR_ZERO), (0.5, "0")])


def _is_power_of_ten(value: float) -> bool:
    exponent = math.log10(value)
    return abs(exponent - round(exponent)) < 1e-6


def _power_text(edge: float) -> str:
    exponent = round(math.log10(abs(edge)))
    return f"{'−' if edge < 0 else ''}{power_text(10, exponent) if exponent else 1}"


def _sum_text(edge: float) -> str:
    return f"{edge:.2g}".replace("-", "−", 1) if edge < 0 else f"{edge:.2g}"
