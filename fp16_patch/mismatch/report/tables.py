"""The tables of the page as data: comparison, alerts, worst tokens, ledgers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fp16_patch.mismatch.record.episodes import Episode
from fp16_patch.mismatch.record.reading import FLOAT32_BY_DESIGN, RunRecord, Runs
from fp16_patch.mismatch.report.comparison import comparison_rows, dtypes_text, number_text
from fp16_patch.mismatch.report.decoding import TextOf
from fp16_patch.mismatch.statistics.summary import WorstToken

QUANTITIES = (
    "autocast",
    "parameter",
    "master",
    "activation",
    "gemm_sum",
    "gradient",
    "wire",
    "engine_weight",
    "kv_cache",
    "logits",
    "log_prob",
    "entropy",
)
LEDGER_KEY = "▲ differs from the plan; float32 is by design in " + ", ".join(
    quantity for quantity in QUANTITIES if quantity in FLOAT32_BY_DESIGN
)


@dataclass(frozen=True)
class Cell:
    """A cell that is more than text; ``is_token``: a token's text, which may run in either direction."""

    text: str
    css_class: str = ""
    title: str = ""
    is_token: bool = False


@dataclass(frozen=True)
class Row:
    """A row, headed by what stands first in it."""

    first: str
    cells: Sequence[str | Cell]
    css_class: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head; ``name`` and ``note`` are its caption."""

    head: Sequence[str]
    rows: Sequence[Row]
    name: str = ""
    note: str = ""
    css_class: str = ""


def comparison_table(runs: Runs) -> Table:
    """Set the runs side by side, a column each."""
    return Table(["", *runs], [Row(label, cells) for label, cells in comparison_rows(runs)], css_class="compare")


def alerts_table(name: str, run: RunRecord) -> Table | None:
    """List every alert of the run and mark those that still stand; None if there was none."""
    if not run.alerts:
        return None
    head = ("alert", "since step", "until", "value there", "threshold")
    return Table(head, [_alert_row(episode) for episode in run.alerts], name, "▲ stands at the last step")


def _alert_row(episode: Episode) -> Row:
    alert = episode.alert
    until = "now" if episode.standing else number_text(episode.until)
    cells = (number_text(alert.since), until, number_text(alert.value), number_text(alert.threshold))
    first = f"▲ {alert.name}" if episode.standing else alert.name
    return Row(first, cells, "standing" if episode.standing else "")


def worst_tokens_table(name: str, run: RunRecord, text_of: TextOf | None, note: str) -> Table | None:
    """List the tokens of the largest |d|; None if there are none.

    Args:
        text_of: gives a token's text by its id.
        note: says where the texts are from, or why there are none.
    """
    if not run.worst:
        return None
    head = ("step", "sequence", "position", "token id", "token", "p sampler", "p learner", "d")
    return Table(head, [_worst_row(step, token, text_of) for step, token in run.worst], name, note, "tight")


def _worst_row(step: int, token: WorstToken, text_of: TextOf | None) -> Row:
    known = token.token_id >= 0
    text = (text_of(token.token_id) if text_of is not None and known else "") or "–"
    cells = (
        number_text(token.sequence),
        number_text(token.position),
        number_text(token.token_id) if known else "–",
        Cell(text, "text", is_token=True),
        _probability(token.sampler),
        _probability(token.learner),
        number_text(token.d),
    )
    return Row(str(step), cells)


def _probability(log_probability: float) -> str:
    return number_text(math.exp(min(log_probability, 1.0)))


def ledger_table(name: str, run: RunRecord) -> Table | None:
    """List the dtypes that were seen, a row a role, and mark what differs from the plan; None if none were recorded."""
    seen = {quantity for row in run.ledger.values() for quantity in row}
    quantities = [*(quantity for quantity in QUANTITIES if quantity in seen), *sorted(seen - {*QUANTITIES})]
    if not quantities:
        return None
    rows = [
        Row(role, [_ledger_cell(run, row, quantity) for quantity in quantities])
        for role, row in sorted(run.ledger.items())
    ]
    note = f"planned {run.planned_dtype() or 'no dtype'}; {run.processes} processes. {LEDGER_KEY}"
    return Table(["role", *quantities], rows, name, note)


def _ledger_cell(run: RunRecord, row: dict[str, list[str]], quantity: str) -> str | Cell:
    dtypes = row.get(quantity, [])
    if run.deviates(quantity, dtypes):
        return Cell(f"▲ {dtypes_text(dtypes)}", "deviates", f"planned {run.planned_dtype()}")
    return dtypes_text(dtypes)
