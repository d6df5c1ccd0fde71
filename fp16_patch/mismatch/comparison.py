"""The comparison of runs as a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fp16_patch.mismatch.record import RunRecord, Runs

COMPUTE_QUANTITIES = ("activation", "autocast", "parameter")


def print_comparison(runs: Runs, console: Console) -> None:
    """Print the runs side by side, a column each; ratios are of the first run's mean |d| to each run's."""
    table = Table(title="Sampler/learner mismatch, d = log π_learner − log μ_sampler", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right", overflow="fold")
    for label, cells in comparison_rows(runs):
        table.add_row(label, *cells)
    console.print(table)
    for sentence in verdict(runs):
        console.print(sentence, markup=False, highlight=False)
    for name, run in runs.items():
        for note in run.notes:
            console.print(f"{name}: {note}", style="dim", markup=False, highlight=False)


def comparison_rows(runs: Runs) -> list[tuple[str, list[str]]]:
    """Rows of (label, a cell for each run)."""
    summaries = {name: run.summary() for name, run in runs.items()}
    first = next(iter(summaries), "")
    against_first = f"mean |d| of {first} ÷ this"

    def mismatch(key: str) -> Callable[[str], str]:
        return lambda name: number_text(summaries[name]["mismatch"][key])

    def times_less(name: str) -> str:
        return _times(ratio(summaries[first]["mismatch"]["mean_abs"], summaries[name]["mismatch"]["mean_abs"]))

    rows: dict[str, Callable[[str], str]] = {
        "plan": lambda name: _plan_text(runs[name].plan),
        "steps": lambda name: number_text(summaries[name]["steps"]),
        "tokens": lambda name: number_text(summaries[name]["tokens"]),
        "wall time": lambda name: _duration(summaries[name]["wall_s"]),
        "mean |d|": mismatch("mean_abs"),
        against_first: times_less,
        "max |d|": mismatch("max_abs"),
        "mean |Σd| a sequence": mismatch("seq_mean_abs"),
        "mean |Δp|": mismatch("prob_mean_abs"),
        "k1 = mean(−d)": mismatch("k1"),
        "k3 = mean(r − 1 − d)": mismatch("k3"),
        "non-finite tokens": lambda name: number_text(runs[name].total().nonfinite_tokens),
        "reward, first → last": lambda name: _first_to_last(summaries[name]["reward"]),
        "loss scale": lambda name: number_text(summaries[name]["loss_scale"]),
        "skipped steps": lambda name: number_text(summaries[name]["skipped"]),
        "actor compute": lambda name: dtypes_text(runs[name].dtypes_of(COMPUTE_QUANTITIES, "actor")),
        "sampler weights": lambda name: dtypes_text(runs[name].dtypes_of(["engine_weight"])),
    }
    if len(runs) < 2:
        del rows[against_first]
    return [(label, [cell(name) for name in runs]) for label, cell in rows.items()]


def verdict(runs: Runs) -> list[str]:
    """Sentences for the head of the page, the most important first."""
    return [_mismatch_verdict(runs), *(_ledger_verdict(name, run) for name, run in runs.items())]


def _mismatch_verdict(runs: Runs) -> str:
    means = {name: run.summary()["mismatch"]["mean_abs"] for name, run in runs.items()}
    measured = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not measured:
        return "No mismatch was measured."
    best = min(measured, key=measured.__getitem__)
    worst = max(measured, key=measured.__getitem__)
    least = number_text(measured[best])
    if best == worst:
        return f"{best}: mean |d| is {least} over {number_text(runs[best].total().tokens)} tokens."
    factor = _times(ratio(measured[worst], measured[best]))
    return f"{best} has the smallest mismatch: mean |d| is {least}, {factor} less than in {worst}."


def _ledger_verdict(name: str, run: RunRecord) -> str:
    if not run.ledger:
        return f"{name}: no dtypes were recorded."
    if run.planned_dtype() is None:
        return _uniformity_verdict(name, run)
    deviations = run.deviations()
    if not deviations:
        return f"{name}: every recorded dtype is as planned, {run.planned_dtype()}."
    listed = "; ".join(f"{role} {quantity} in {dtypes_text(dtypes)}" for role, quantity, dtypes in deviations)
    return f"▲ {name}: planned {run.planned_dtype()}, but saw {listed}."


def _uniformity_verdict(name: str, run: RunRecord) -> str:
    """For a run that was only observed: nothing says which dtype is right, only whether there is one."""
    by_role = {role: run.compute_dtypes(role) for role in sorted(run.ledger)}
    distinct = {dtype for dtypes in by_role.values() for dtype in dtypes}
    if len(distinct) <= 1:
        return f"{name}: no dtype was planned; compute was {dtypes_text(sorted(distinct))} throughout."
    listed = "; ".join(f"{role} in {dtypes_text(dtypes)}" for role, dtypes in by_role.items() if dtypes)
    return f"▲ {name}: no dtype was planned, and compute was mixed: {listed}."


def _plan_text(plan: dict[str, Any]) -> str:
    return ", ".join(str(plan[key]) for key in ("mode", "dtype") if plan.get(key)) or "–"


def dtypes_text(dtypes: Sequence[str]) -> str:
    return ", ".join(dtypes) or "–"


def _first_to_last(values: Sequence[float]) -> str:
    return f"{number_text(values[0])} → {number_text(values[-1])}" if values else "–"


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _times(factor: float) -> str:
    return f"{number_text(factor)}×" if math.isfinite(factor) else "–"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number_text(value: float | None) -> str:
    """Three significant digits; whole numbers in full; – where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.3g}" if 0.1 <= abs(value) < 999.5 else _scientific(f"{value:.2e}")


def _scientific(number: str) -> str:
    mantissa, exponent = number.split("e")
    return f"{mantissa}e{int(exponent)}"
