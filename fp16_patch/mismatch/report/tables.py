"""The tables of the page: comparison, alerts, worst tokens, ledgers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from fp16_patch.mismatch.record.reading import FLOAT32_BY_DESIGN, Episode, RunRecord, Runs
from fp16_patch.mismatch.report.comparison import comparison_rows, dtypes_text, number_text
from fp16_patch.mismatch.report.decoding import TextOf
from fp16_patch.mismatch.statistics.summary import WorstToken

QUANTITIES = (
    "autocast",
    "parameter",
    "master",
    "activation",
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


def html_table(head: Iterable[str], rows: Iterable[str], caption: str = "", css_class: str = "") -> str:
    """``rows`` and ``caption`` are HTML, ``head`` is text."""
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    shown = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table{_class(css_class)}>{shown}<thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def html_row(first: str, cells: Sequence[str], css_class: str = "") -> str:
    shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr{_class(css_class)}><th>{escape(first)}</th>{shown}</tr>"


def comparison_table(runs: Runs) -> str:
    return html_table(["", *runs], (html_row(label, cells) for label, cells in comparison_rows(runs)))


def alerts_table(name: str, run: RunRecord) -> str:
    """Every alert of the run, those that still stand marked; nothing if there was none."""
    episodes = run.episodes()
    if not episodes:
        return ""
    head = ("alert", "since step", "until", "value there", "threshold")
    return html_table(head, map(_alert_row, episodes), f"<b>{escape(name)}</b>▲ stands at the last step")


def _alert_row(episode: Episode) -> str:
    alert = episode.alert
    until = "now" if episode.standing else number_text(episode.until)
    cells = (number_text(alert.since), until, number_text(alert.value), number_text(alert.threshold))
    first = f"▲ {alert.name}" if episode.standing else alert.name
    return html_row(first, cells, "standing" if episode.standing else "")


def worst_tokens_table(name: str, run: RunRecord, text_of: TextOf | None, note: str) -> str:
    """The tokens of the largest |d|; ``note`` says where their texts are from, or why there are none."""
    if not run.worst:
        return ""
    head = ("step", "sequence", "position", "token id", "token", "p sampler", "p learner", "d")
    rows = (_worst_row(step, token, text_of) for step, token in run.worst)
    return html_table(head, rows, f"<b>{escape(name)}</b>{escape(note)}", "tight")


def _worst_row(step: int, token: WorstToken, text_of: TextOf | None) -> str:
    known = token.token_id >= 0
    text = (text_of(token.token_id) if text_of is not None and known else "") or "–"
    first = (number_text(token.sequence), number_text(token.position), number_text(token.token_id) if known else "–")
    last = (_probability(token.sampler), _probability(token.learner), number_text(token.d))
    return (
        f"<tr><th>{step}</th>{''.join(f'<td>{cell}</td>' for cell in first)}"
        f'<td class="text"><bdi>{escape(text)}</bdi></td>{"".join(f"<td>{cell}</td>" for cell in last)}</tr>'
    )


def _probability(log_probability: float) -> str:
    return number_text(math.exp(min(log_probability, 1.0)))


def ledger_table(name: str, run: RunRecord) -> str:
    seen = {quantity for row in run.ledger.values() for quantity in row}
    quantities = [*(quantity for quantity in QUANTITIES if quantity in seen), *sorted(seen - {*QUANTITIES})]
    if not quantities:
        return f'<p class="soft"><b>{escape(name)}</b>: no dtypes were recorded.</p>'
    rows = (
        f"<tr><th>{escape(role)}</th>{''.join(_ledger_cell(run, row, quantity) for quantity in quantities)}</tr>"
        for role, row in sorted(run.ledger.items())
    )
    planned = run.planned_dtype() or "no dtype"
    caption = f"<b>{escape(name)}</b>planned {escape(planned)}; {run.processes} processes. {LEDGER_KEY}"
    return html_table(["role", *quantities], rows, caption)


def _ledger_cell(run: RunRecord, row: dict[str, list[str]], quantity: str) -> str:
    dtypes = row.get(quantity, [])
    text = escape(dtypes_text(dtypes))
    if run.deviates(quantity, dtypes):
        return f'<td class="deviates" title="planned {escape(str(run.planned_dtype()))}">▲ {text}</td>'
    return f"<td>{text}</td>"
