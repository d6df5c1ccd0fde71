"""The self-contained HTML page of a report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fp16_patch.mismatch.diagnosis.findings import Diagnosis, diagnose_run
from fp16_patch.mismatch.record.reading import RunRecord, Runs
from fp16_patch.mismatch.report.comparison import cause_text, gap_sentence, is_offline, key_figures, verdict
from fp16_patch.mismatch.report.decoding import TokenizerError, tokenizer_of
from fp16_patch.mismatch.report.distributions import distribution_charts, length_maps, probability_maps
from fp16_patch.mismatch.report.rendering import TEMPLATES, render
from fp16_patch.mismatch.report.tables import (
    Table,
    alerts_table,
    comparison_table,
    ledger_table,
    worst_tokens_table,
)
from fp16_patch.mismatch.report.trends import trend_charts
from fp16_patch.untrusted.paths import is_folder


@dataclass(frozen=True)
class RunSummary:
    """What stands about a run at the head of the page, and its diagnosis."""

    name: str
    sentence: str
    figures: list[tuple[str, str]]
    findings: list[Diagnosis]


def write_html(
    runs: Runs, path: str | Path, title: str = "Sampler/learner mismatch", tokenizer: str | Path | None = None
) -> None:
    """Write one page that needs no network and no other file.

    Args:
        tokenizer: a directory or file with the tokenizer that names the worst tokens; by default the one of the model
            in the run's plan, where that is on this machine.

    Raises:
        ValueError: there is no run to show.
        ReportExtraMissing: jinja2 or plotly is not installed.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    page = render(
        TEMPLATES / "report.html.j2",
        title=title,
        runs=[*runs],
        summaries=[_summary(name, run) for name, run in runs.items()],
        verdict=verdict(runs),
        cause_text=cause_text,
        alerts=[table for name, run in runs.items() if (table := alerts_table(name, run))],
        comparison=comparison_table(runs),
        trends=trend_charts(runs),
        distributions=distribution_charts(runs),
        maps={
            "Sampler's probability against learner's": probability_maps(runs),
            "Σd against the length of the sequence": length_maps(runs),
        },
        worst=[table for name, run in runs.items() if (table := _worst_table(name, run, tokenizer))],
        ledgers={name: ledger_table(name, run) for name, run in runs.items() if not is_offline(run)},
        records=runs,
        plans={name: json.dumps(run.plan, indent=2, sort_keys=True) for name, run in runs.items()},
    )
    Path(path).write_text(page, encoding="utf-8")


def _summary(name: str, run: RunRecord) -> RunSummary:
    findings = diagnose_run(run)
    return RunSummary(name, gap_sentence(run, findings[0]), key_figures(run), findings)


def _worst_table(name: str, run: RunRecord, tokenizer: str | Path | None) -> Table | None:
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
    return model if isinstance(model, str) and is_folder(model) else None
