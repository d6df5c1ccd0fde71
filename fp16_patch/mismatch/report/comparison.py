"""The comparison of runs as a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp16_patch.mismatch.diagnosis.drift import LagCurve
from fp16_patch.mismatch.diagnosis.findings import Diagnosis, diagnose_run
from fp16_patch.mismatch.diagnosis.rounding import MIN_TOKENS
from fp16_patch.mismatch.record.reading import RunRecord, Runs
from fp16_patch.untrusted.text import printable

# What a finding says, before its evidence.
CAUSES = {
    "precision": "rounding explains the gap",
    "temperature": "the two sides divide the logits by different temperatures",
    "raw_log_probs": "the sampler reports log-probs from before temperature and truncation",
    "truncated_sampling": "the sampler truncates (top-p or top-k), the learner does not",
    "stale_weights": "the sampler runs on older weights than the learner",
    "mask_shifted": "the two sides score different tokens",
    "one_side_lower_precision": "one side computes in lower precision than the other",
    "nonfinite_sampler": "the sampler's log-probs are not all finite",
    "nonfinite_learner": "the learner's log-probs are not all finite",
    "not_log_probs": "what is recorded are no log-probs",
    "certain_tokens": "the sampler has no log-prob for some tokens that are certain, a known artefact",
    "drift": "part of the gap is drift: samples of older weights",
    "after_start": "the gap is large in the first steps after a start",
    "coarse_record": "the log-probs on record are rounded to a coarse dtype",
    "one_position": "the gap lies on one place of the sequences",
    "rare_spikes": "a few tokens are far off, the others are not",
    "rounded_adapters": "or: adapters are rounded into the base weights on one side",
    "unknown": "no known cause explains the gap",
}
OFFLINE = "analyze"
"""The mode of a record that was made of a file of log-probs, not of a run."""

FRESH, LAG = "mean |d| at lag 0", "mean lag, versions"
"""Of runs that know how old their samples' weights are."""

AGAINST_ITSELF, COVERAGE, ALERTS = "mean |d| ÷ learner against itself", "tokens measured", "alerts at the end"
PLAN, WALL_TIME, REWARD, LOSS_SCALE, SKIPPED = (
    "plan",
    "wall time",
    "reward, first → last",
    "loss scale",
    "skipped steps",
)
ACTOR, SAMPLER = "actor compute", "sampler weights"
LEFT_OUT_IF_EMPTY = frozenset({FRESH, LAG, PLAN, WALL_TIME, REWARD, LOSS_SCALE, SKIPPED, ACTOR, SAMPLER})
"""A file of log-probs has none of these. A metric that is missing is shown as missing."""

COMPUTE_QUANTITIES = ("activation", "autocast", "parameter")


def print_comparison(runs: Runs, console: Console) -> None:
    """Print the runs side by side, a column each; ratios are of the first run's mean |d| to each run's."""
    table = Table(title="Sampler/learner mismatch, d = log π_learner − log μ_sampler", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(_text(name), justify="right", overflow="fold")
    for label, cells in comparison_rows(runs):
        table.add_row(*map(_text, (label, *cells)))
    console.print(table)
    for sentence in verdict(runs):
        console.print(_text(sentence), highlight=False)
    for name, run in runs.items():
        for note in run.notes:
            console.print(_text(f"{name}: {note}"), style="dim", highlight=False)


def print_diagnosis(runs: Runs, console: Console) -> None:
    """Print each run's findings: the cause, the figures it rests on, and what to do."""
    for name, run in runs.items():
        for finding in diagnose_run(run):
            console.print(_text(f"{name}: {cause_text(finding)}"), style="bold", highlight=False)
            for sentence in finding.evidence:
                console.print(_text(f"  {sentence}"), highlight=False)
            console.print(_text(f"  → {finding.advice}"), highlight=False)


def _text(shown: str) -> Text:
    """Return what is printed as it is: no markup, no control characters, whatever the console."""
    return Text(printable(shown))


def cause_text(finding: Diagnosis) -> str:
    """Say what the finding is, in a clause without evidence."""
    return CAUSES.get(finding.cause, finding.cause.replace("_", " "))


def comparison_rows(runs: Runs) -> list[tuple[str, list[str]]]:
    """Return rows of (label, a cell for each run); without those that say nothing of any run."""
    summaries = {name: run.summary() for name, run in runs.items()}
    first = next(iter(summaries), "")
    at = " at lag 0" if any(run.by_lag for run in runs.values()) else ""
    against_first = f"mean |d|{at} of {first} ÷ this"

    def mismatch(key: str) -> Callable[[str], str]:
        return lambda name: number_text(summaries[name]["mismatch"][key])

    def times_less(name: str) -> str:
        return _times(ratio(numeric_mean_abs(runs[first]), numeric_mean_abs(runs[name])))

    rows: dict[str, Callable[[str], str]] = {
        PLAN: lambda name: _plan_text(runs[name]),
        "steps": lambda name: number_text(summaries[name]["steps"]),
        "tokens": lambda name: number_text(summaries[name]["tokens"]),
        WALL_TIME: lambda name: _duration(summaries[name]["wall_s"]),
        "mean |d|": mismatch("mean_abs"),
        FRESH: lambda name: number_text(fresh_mean_abs(runs[name])),
        LAG: lambda name: number_text(LagCurve.of(runs[name].by_lag).mean_lag),
        against_first: times_less,
        AGAINST_ITSELF: lambda name: _times(runs[name].over_floor()),
        "max |d|": mismatch("max_abs"),
        "mean |Σd| a sequence": mismatch("seq_mean_abs"),
        "mean |Δp|": mismatch("prob_mean_abs"),
        "k1 = mean(−d)": mismatch("k1"),
        "k3 = mean(r − 1 − d)": mismatch("k3"),
        "effective sample size": lambda name: percent_text(runs[name].total().metrics(prefix="")["ess"]),
        "non-finite tokens": lambda name: number_text(runs[name].total().nonfinite_tokens),
        REWARD: lambda name: _first_to_last(summaries[name]["reward"]),
        LOSS_SCALE: lambda name: number_text(summaries[name]["loss_scale"]),
        SKIPPED: lambda name: _skipped_text(summaries[name]),
        COVERAGE: lambda name: coverage_text(runs[name]),
        ALERTS: lambda name: _standing(runs[name]) or "none",
        ACTOR: lambda name: dtypes_text(runs[name].dtypes_of(COMPUTE_QUANTITIES, "actor")),
        SAMPLER: lambda name: dtypes_text(runs[name].dtypes_of(["engine_weight"])),
    }
    idle = _idle_rows(runs, against_first)
    shown = [(label, [cell(name) for name in runs]) for label, cell in rows.items() if label not in idle]
    return [(label, cells) for label, cells in shown if label not in LEFT_OUT_IF_EMPTY or {*cells} != {"–"}]


def fresh_mean_abs(run: RunRecord) -> float:
    """Return mean |d| of the tokens that were sampled with the learner's weights; NaN where lags are not known."""
    fresh = run.by_lag.get(0)
    return math.nan if fresh is None else fresh.metrics(prefix="")["mean_abs"]


def numeric_mean_abs(run: RunRecord) -> float:
    """Return mean |d| by which runs are compared: without drift, where the run knows how old its samples are."""
    return fresh_mean_abs(run) if run.by_lag else run.total().metrics(prefix="")["mean_abs"]


def _idle_rows(runs: Runs, against_first: str) -> set[str]:
    """Return the rows that say nothing of any of the runs."""
    idle = {
        against_first: len(runs) < 2,
        AGAINST_ITSELF: all(run.noise_floor is None for run in runs.values()),
        COVERAGE: not any(run.covered.steps for run in runs.values()),
        ALERTS: not any(run.alerts for run in runs.values()),
    }
    return {label for label, is_idle in idle.items() if is_idle}


def gap_sentence(run: RunRecord, finding: Diagnosis) -> str:
    """Say in one sentence what kind of gap the run has, by the most important finding."""
    total = run.total()
    mean = total.metrics(prefix="")["mean_abs"]
    if total.finite_tokens and not mean and finding.cause == "precision":
        return "Sampler and learner agree exactly."
    if total.finite_tokens < MIN_TOKENS and finding.cause == "unknown":
        return f"{number_text(total.finite_tokens)} tokens are too few to say what the gap comes from."
    said = cause_text(finding)
    return f"{said[0].upper()}{said[1:]}: mean |d| is {number_text(mean)} over {number_text(total.tokens)} tokens."


def key_figures(run: RunRecord) -> list[tuple[str, str]]:
    """Return the few figures (label, value) that stand at the head of the page."""
    metrics = run.total().metrics(prefix="")
    actor, sampler = run.dtypes_of(COMPUTE_QUANTITIES, "actor"), run.dtypes_of(["engine_weight"])
    dtypes = {"both in": actor} if actor == sampler else {"actor in": actor, "sampler in": sampler}
    return [
        ("mean |d|", number_text(metrics["mean_abs"])),
        ("max |d|", number_text(metrics["max_abs"])),
        ("k3", number_text(metrics["k3"])),
        ("ESS", percent_text(metrics["ess"])),
        *((role, dtypes_text(seen)) for role, seen in dtypes.items() if seen),
    ]


def verdict(runs: Runs) -> list[str]:
    """Return sentences on all runs, the most important first."""
    alerts = (_alerts_verdict(name, run) for name, run in runs.items())
    ledgers = (_ledger_verdict(name, run) for name, run in runs.items() if not is_offline(run))
    return [_mismatch_verdict(runs), *filter(None, alerts), *ledgers]


def _alerts_verdict(name: str, run: RunRecord) -> str:
    standing = _standing(run)
    return f"▲ {name}: alerts stand at the last step: {standing}." if standing else ""


def _mismatch_verdict(runs: Runs) -> str:
    means = {name: numeric_mean_abs(run) for name, run in runs.items()}
    measured = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not measured:
        return "No mismatch was measured."
    best = min(measured, key=measured.__getitem__)
    worst = max(measured, key=measured.__getitem__)
    least = number_text(measured[best])
    if runs[best].by_lag:
        least += " at lag 0"
    if best == worst:
        tokens = runs[best].by_lag[0].tokens if runs[best].by_lag else runs[best].total().tokens
        return f"{best}: mean |d| is {least} over {number_text(tokens)} tokens."
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
    """Say whether a run that was only observed computed in one dtype: nothing says which is right."""
    by_role = {role: run.compute_dtypes(role) for role in sorted(run.ledger)}
    distinct = {dtype for dtypes in by_role.values() for dtype in dtypes}
    if len(distinct) <= 1:
        return f"{name}: no dtype was planned; compute was {dtypes_text(sorted(distinct))} throughout."
    listed = "; ".join(f"{role} in {dtypes_text(dtypes)}" for role, dtypes in by_role.items() if dtypes)
    return f"▲ {name}: no dtype was planned, and compute was mixed: {listed}."


def is_offline(run: RunRecord) -> bool:
    """Say whether the record was made of a file of log-probs, which holds neither a plan nor dtypes."""
    return bool(run.plan.get("mode") == OFFLINE)


def _plan_text(run: RunRecord) -> str:
    plan = {} if is_offline(run) else run.plan
    return ", ".join(str(plan[key]) for key in ("mode", "dtype") if plan.get(key)) or "–"


def _skipped_text(summary: dict[str, Any]) -> str:
    """Say how many steps were skipped; nothing of a run that has no loss scale."""
    return "–" if summary["loss_scale"] is None and not summary["skipped"] else number_text(summary["skipped"])


def dtypes_text(dtypes: Sequence[str]) -> str:
    return ", ".join(dtypes) or "–"


def _first_to_last(values: Sequence[float]) -> str:
    return f"{number_text(values[0])} → {number_text(values[-1])}" if values else "–"


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _times(factor: float) -> str:
    return f"{number_text(factor)}×" if math.isfinite(factor) else "–"


def percent_text(share: float) -> str:
    """Write a share with two digits of what is missing from the whole, where that is less than a tenth: 99.987 %."""
    if not math.isfinite(share):
        return "–"
    missing = 100 * (1 - share)
    # The exponent once rounded: 9.99e-4 are 1.0e-3.
    digits = min(6, 1 - int(f"{missing:.1e}".split("e")[1])) if 1e-6 < missing < 10 else 0
    return f"{100 * share:.{digits}f} %"


def coverage_text(run: RunRecord) -> str:
    """Say which share of the tokens was measured, and how many steps were not measured whole."""
    covered = run.covered
    if not covered.partial:
        return "all" if covered.steps else "–"
    return f"{percent_text(covered.share())}, {covered.partial} of {covered.steps} steps in part"


def _standing(run: RunRecord) -> str:
    """List the alerts that stand at the last step; nothing if there are none."""
    standing = [episode.alert for episode in run.alerts if episode.standing]
    return ", ".join(f"{alert.name} since step {alert.since}" for alert in standing)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number_text(value: float | None) -> str:
    """Write three significant digits; whole numbers in full, and no others like them; – where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    # What a quotient's last bits make of 5 is 5.
    if math.isclose(value, round(value), rel_tol=1e-9) and abs(value) < 1e15:
        return f"{round(value):,}".replace(",", "\u202f")
    if not 0.1 <= abs(value) < 999.5:
        return _scientific(f"{value:.2e}")
    rounded = f"{value:.3g}"
    return rounded if "." in rounded else f"{value:#.3g}".removesuffix(".")


def _scientific(number: str) -> str:
    mantissa, exponent = number.split("e")
    return f"{mantissa}e{int(exponent)}"
