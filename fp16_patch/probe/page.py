"""A probe's result as one self-contained page, with the plots of the paper's Fig. 5."""

from __future__ import annotations

import io
import json
from html import escape
from pathlib import Path

from rich.console import Console

from fp16_patch.mismatch.record.reading import RunRecord
from fp16_patch.mismatch.report.distributions import distribution_charts, length_maps, probability_maps
from fp16_patch.mismatch.report.figure import figure
from fp16_patch.mismatch.report.heatmap import heatmap_figure
from fp16_patch.mismatch.report.page import STYLE
from fp16_patch.probe.result import ProbeResult
from fp16_patch.probe.terminal import print_result

WIDTH = 150

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>
{style}</style></head><body><main>
<h1>{title}</h1>
<div class="verdict"><pre>{text}</pre></div>
<h2>Sampler's probability against learner's</h2><div class="charts small">{probabilities}</div>
<h2>Σd against the length of the response</h2><div class="charts small">{lengths}</div>
<h2>Where the gap lies</h2><div class="charts">{distributions}</div>
<h2>Everything</h2><details><summary>JSON</summary><pre>{everything}</pre></details>
</main></body></html>
"""


def write_page(result: ProbeResult, path: Path) -> None:
    """Write one page that needs no network and no script."""
    runs = _equal_pairs(result)
    page = PAGE.format(
        title=escape(f"Probe of {result.model['path']}"),
        style=STYLE.read_text(encoding="utf-8"),
        text=escape(_text(result)),
        probabilities="".join(map(heatmap_figure, probability_maps(runs))),
        lengths="".join(map(heatmap_figure, length_maps(runs))),
        distributions="".join(map(figure, distribution_charts(runs))),
        everything=escape(json.dumps(result.as_dict(), indent=1)),
    )
    path.write_text(page, encoding="utf-8")


def _equal_pairs(result: ProbeResult) -> dict[str, RunRecord]:
    """The pairs of one dtype on both sides, as what the report's charts are drawn of."""
    return {
        name: RunRecord(Path(name), {}, {}, 0, {}, {}, pair.stats, None)
        for name, pair in result.pairs.items()
        if len(set(name.split("/"))) == 1
    }


def _text(result: ProbeResult) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, record=True)
    print_result(result, console)
    return console.export_text()
