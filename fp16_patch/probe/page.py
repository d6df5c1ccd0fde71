"""A probe's result as one self-contained page, with the plots of the paper's Fig. 5."""

from __future__ import annotations

import io
import json
from pathlib import Path

from fp16_patch.mismatch.record.reading import RunRecord
from fp16_patch.mismatch.report.distributions import distribution_charts, length_maps, probability_maps
from fp16_patch.mismatch.report.rendering import render
from fp16_patch.probe.result import ProbeResult
from fp16_patch.probe.terminal import VERDICTS, print_result
from fp16_patch.untrusted.console import TextConsole
from fp16_patch.untrusted.text import printable

TEMPLATE = Path(__file__).with_name("page.html.j2")
WIDTH = 150


def write_page(result: ProbeResult, path: Path) -> None:
    """Write one page that needs no network and no other file.

    Raises:
        ReportExtraMissing: jinja2 or plotly is not installed.
    """
    runs = _equal_pairs(result)
    page = render(
        TEMPLATE,
        title=f"Probe of {printable(result.model['path'])}",
        runs=[*runs],
        verdict=VERDICTS[result.recommendation.precision][0],
        reasons=[printable(reason) for reason in result.recommendation.reasons],
        text=_text(result),
        probabilities=probability_maps(runs),
        lengths=length_maps(runs),
        distributions=distribution_charts(runs),
        everything=json.dumps(result.as_dict(), indent=1),
    )
    path.write_text(page, encoding="utf-8")


def _equal_pairs(result: ProbeResult) -> dict[str, RunRecord]:
    """Return the pairs of one dtype on both sides, as the records that the report's charts are drawn of."""
    return {
        name: RunRecord(Path(name), stats=pair.stats)
        for name, pair in result.pairs.items()
        if len(set(name.split("/"))) == 1
    }


def _text(result: ProbeResult) -> str:
    console = TextConsole(file=io.StringIO(), width=WIDTH, record=True)
    print_result(result, console)
    return console.export_text()
