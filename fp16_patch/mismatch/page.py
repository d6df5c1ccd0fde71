"""The self-contained HTML page of a report."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from fp16_patch.mismatch.chart import charts, figure
from fp16_patch.mismatch.comparison import comparison_rows, dtypes_text, verdict
from fp16_patch.mismatch.record import FLOAT32_BY_DESIGN, RunRecord, Runs

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

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#17191c;--soft:#5c636d;--rule:#dfe3e8;--warn:#8f3d00;
--warn-fill:#fdebdc;--c0:#2a6fd0;--c1:#d9541e;--c2:#0f8f68;--c3:#b07a00;--c4:#c2407f;--c5:#5a48b8}
@media(prefers-color-scheme:dark){:root{--page:#121417;--card:#1b1e23;--ink:#e8eaed;--soft:#9ba3ae;--rule:#333941;
--warn:#ffb583;--warn-fill:#42270f;--c0:#6aa7f5;--c1:#f08555;--c2:#3cc496;--c3:#dfae3a;--c4:#ec86b4;--c5:#a598f2}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}h2{font-size:19px;margin:40px 0 12px}h3{font-size:15px;margin:0}
p{margin:0}.soft,figcaption p,caption{color:var(--soft);font-size:13px}
.verdict{background:var(--card);border:1px solid var(--rule);border-left:4px solid var(--c0);border-radius:8px;
padding:14px 18px;margin:20px 0}
.verdict strong{display:block;font-size:18px;line-height:1.4}.verdict ul{margin:6px 0 0;padding-left:20px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:8px;margin:0 0 16px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:10px 14px 4px}caption b{color:var(--ink);font-size:15px;margin-right:8px}
th,td{padding:6px 14px;text-align:right;border-top:1px solid var(--rule);white-space:nowrap}
thead th{border-top:0}caption+thead th{color:var(--soft);font-weight:500}
tr>:first-child{text-align:left}tbody th{font-weight:400;color:var(--soft)}
td.deviates{background:var(--warn-fill);color:var(--warn);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:14px 14px 8px;
display:flex;flex-direction:column;justify-content:space-between}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin:4px 0 6px}
.legend span{display:inline-flex;align-items:center;gap:6px}.key{width:26px;height:12px;overflow:visible}
figure>svg{width:100%;height:auto;display:block;overflow:visible}
svg text{fill:var(--soft);font-size:12px}text.y{text-anchor:end}text.x,text.label{text-anchor:middle}
.grid{stroke:var(--rule)}.axis,.tick{stroke:var(--soft)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.mark,.mark path{fill:var(--c);stroke:var(--card);stroke-width:1}.mark:hover path{stroke:var(--ink);stroke-width:2}
.quiet path{opacity:0}.quiet:hover path{opacity:1}
.band{fill:var(--c);opacity:.13}.skip path{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linecap:round}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}.s5{--c:var(--c5)}
details{margin-top:8px}summary{cursor:pointer}pre{overflow-x:auto;font-size:13px;margin:8px 0 0}
@media print{body{background:#fff}figure,.scroll{break-inside:avoid}}
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1><p class="soft">d = log π<sub>learner</sub> − log μ<sub>sampler</sub> of each sampled token,
r = exp(d), Δp the difference of the probabilities. Point at a mark to read its value.</p>
{verdict}
<h2>Comparison</h2>{comparison}
<h2>Over the steps</h2>{charts}
<h2>Dtypes that were seen</h2>{ledgers}
<h2>Records</h2>{records}
</main></body></html>
"""


def write_html(runs: Runs, path: str | Path, title: str = "Sampler/learner mismatch") -> None:
    """Write one page that needs no network and no script: verdict, comparison, charts, ledgers, plans and notes.

    Raises:
        ValueError: there is no run to show.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    figures = "".join(figure(chart) for chart in charts(runs))
    page = PAGE.format(
        title=escape(title),
        style=STYLE,
        verdict=_verdict_html(runs),
        comparison=_comparison_html(runs),
        charts=f'<div class="charts">{figures}</div>' if figures else "<p>No step was recorded.</p>",
        ledgers="".join(_ledger_html(name, run) for name, run in runs.items()),
        records="".join(_record_html(name, run) for name, run in runs.items()),
    )
    Path(path).write_text(page, encoding="utf-8")


def _verdict_html(runs: Runs) -> str:
    first, *rest = map(escape, verdict(runs))
    return f'<div class="verdict"><strong>{first}</strong><ul>{"".join(f"<li>{line}</li>" for line in rest)}</ul></div>'


def _comparison_html(runs: Runs) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in runs)
    body = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for label, cells in comparison_rows(runs)
    )
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _ledger_html(name: str, run: RunRecord) -> str:
    seen = {quantity for row in run.ledger.values() for quantity in row}
    quantities = [*(quantity for quantity in QUANTITIES if quantity in seen), *sorted(seen - {*QUANTITIES})]
    if not quantities:
        return f'<p class="soft"><b>{escape(name)}</b>: no dtypes were recorded.</p>'
    head = "".join(f"<th>{escape(quantity)}</th>" for quantity in quantities)
    body = "".join(
        f"<tr><th>{escape(role)}</th>{''.join(_ledger_cell(run, row, quantity) for quantity in quantities)}</tr>"
        for role, row in sorted(run.ledger.items())
    )
    caption = (
        f"<b>{escape(name)}</b>planned {run.planned_dtype() or 'no dtype'}; {run.processes} processes. {_LEDGER_KEY}"
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>'
        f"<thead><tr><th>role</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


_LEDGER_KEY = "▲ differs from the plan; float32 is by design in " + ", ".join(
    quantity for quantity in QUANTITIES if quantity in FLOAT32_BY_DESIGN
)


def _ledger_cell(run: RunRecord, row: dict[str, list[str]], quantity: str) -> str:
    dtypes = row.get(quantity, [])
    text = escape(dtypes_text(dtypes))
    if run.deviates(quantity, dtypes):
        return f'<td class="deviates" title="planned {escape(str(run.planned_dtype()))}">▲ {text}</td>'
    return f"<td>{text}</td>"


def _record_html(name: str, run: RunRecord) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    plan = escape(json.dumps(run.plan, indent=2, sort_keys=True))
    return (
        f'<div class="verdict"><b>{escape(name)}</b> <span class="soft">{escape(str(run.path))}</span>'
        f"<ul>{notes or '<li>complete</li>'}</ul><details><summary>Plan</summary><pre>{plan}</pre></details></div>"
    )
