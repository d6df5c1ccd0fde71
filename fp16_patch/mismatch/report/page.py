"""The self-contained HTML page of a report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path

from fp16_patch.mismatch.diagnosis.findings import Diagnosis, diagnose_run
from fp16_patch.mismatch.record.reading import RunRecord, Runs
from fp16_patch.mismatch.report.comparison import cause_text, verdict
from fp16_patch.mismatch.report.decoding import TokenizerError, tokenizer_of
from fp16_patch.mismatch.report.distributions import distribution_charts, length_maps, probability_maps
from fp16_patch.mismatch.report.figure import colour, figure
from fp16_patch.mismatch.report.heatmap import Heatmap, heatmap_figure
from fp16_patch.mismatch.report.tables import alerts_table, comparison_table, ledger_table, worst_tokens_table
from fp16_patch.mismatch.report.trends import trend_charts

STYLE = Path(__file__).with_name("page.css")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>
{style}</style></head><body><main>
<h1>{title}</h1><p class="soft">d = log π<sub>learner</sub> − log μ<sub>sampler</sub> of each sampled token,
r = exp(d), Δp the difference of the probabilities, Σd the sum over a sequence. Point at a mark to read its value.</p>
{verdict}
{sections}
</main></body></html>
"""


def write_html(
    runs: Runs, path: str | Path, title: str = "Sampler/learner mismatch", tokenizer: str | Path | None = None
) -> None:
    """Write one page that needs no network and no script.

    Args:
        tokenizer: a directory or file with the tokenizer that names the worst tokens; by default the one of the model
            in the run's plan, where that is on this machine.

    Raises:
        ValueError: there is no run to show.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    sections = {
        "Alerts": "".join(alerts_table(name, run) for name, run in runs.items()),
        "Diagnosis": _diagnosis_html(runs),
        "Comparison": comparison_table(runs),
        "Over the steps": _grid(map(figure, trend_charts(runs))) or "<p>No step was recorded.</p>",
        "Where the gap lies, all steps together": _distributions_html(runs),
        "Worst tokens": "".join(_worst_html(name, run, tokenizer) for name, run in runs.items()),
        "Dtypes that were seen": "".join(ledger_table(name, run) for name, run in runs.items()),
        "Records": "".join(_record_html(name, run) for name, run in runs.items()),
    }
    shown = "\n".join(f"<h2>{heading}</h2>{content}" for heading, content in sections.items() if content)
    style = STYLE.read_text(encoding="utf-8")
    page = PAGE.format(title=escape(title), style=style, verdict=_verdict_html(runs), sections=shown)
    Path(path).write_text(page, encoding="utf-8")


def _verdict_html(runs: Runs) -> str:
    first, *rest = map(escape, verdict(runs))
    return f'<div class="verdict"><strong>{first}</strong><ul>{"".join(f"<li>{line}</li>" for line in rest)}</ul></div>'


def _diagnosis_html(runs: Runs) -> str:
    by_run = (
        f"<div>{''.join(_finding_html(name, style, finding) for finding in diagnose_run(run))}</div>"
        for style, (name, run) in enumerate(runs.items())
    )
    return f'<div class="findings">{"".join(by_run)}</div>'


def _finding_html(name: str, style: int, finding: Diagnosis) -> str:
    evidence = "".join(f"<li>{escape(sentence)}</li>" for sentence in finding.evidence)
    return (
        f'<div class="finding {colour(style)}"><span class="soft">{escape(name)}</span>'
        f"<h3>{escape(cause_text(finding))}</h3><ul>{evidence}</ul>"
        f'<p class="advice">{escape(finding.advice)}</p></div>'
    )


def _distributions_html(runs: Runs) -> str:
    maps = {
        "Sampler's probability against learner's": probability_maps(runs),
        "Σd against the length of the sequence": length_maps(runs),
    }
    return _grid(map(figure, distribution_charts(runs))) + "".join(_maps_html(*titled) for titled in maps.items())


def _maps_html(title: str, heatmaps: list[Heatmap]) -> str:
    return f"<h3>{title}</h3>{_grid(map(heatmap_figure, heatmaps), 'charts small')}" if heatmaps else ""


def _grid(figures: Iterable[str], css_class: str = "charts") -> str:
    content = "".join(figures)
    return f'<div class="{css_class}">{content}</div>' if content else ""


def _worst_html(name: str, run: RunRecord, tokenizer: str | Path | None) -> str:
    if not any(token.token_id >= 0 for _, token in run.worst):
        return worst_tokens_table(name, run, None, "token ids were not recorded")
    where = tokenizer or _model_on_this_machine(run)
    if where is None:
        return worst_tokens_table(name, run, None, "token ids only: for the texts, report with --tokenizer PATH")
    try:
        return worst_tokens_table(name, run, tokenizer_of(where), f"texts by the tokenizer in {where}")
    except TokenizerError as problem:
        return worst_tokens_table(name, run, None, f"token ids only: {problem}")


def _model_on_this_machine(run: RunRecord) -> str | None:
    model = run.plan.get("model")
    return model if isinstance(model, str) and Path(model).is_dir() else None


def _record_html(name: str, run: RunRecord) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    plan = escape(json.dumps(run.plan, indent=2, sort_keys=True))
    starts = f", {len(run.attempts)} starts of the trainer" if len(run.attempts) > 1 else ""
    return (
        f'<div class="verdict"><b>{escape(name)}</b> <span class="soft">{escape(str(run.path))}{starts}</span>'
        f"<ul>{notes or '<li>complete</li>'}</ul><details><summary>Plan</summary><pre>{plan}</pre></details></div>"
    )
