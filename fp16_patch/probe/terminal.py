"""Draws a probe's result in the terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp16_patch.plan.probe_settings import BF16, FP16, FP16_WITH_FP32_MODULES
from fp16_patch.probe.comparing import LOW_LOG_PROB
from fp16_patch.probe.result import ProbeResult
from fp16_patch.probe.watching import Site

SHOWN_ROWS = 5
VERDICTS = {
    FP16: ("fp16", "bold green"),
    FP16_WITH_FP32_MODULES: ("fp16, with modules in fp32 on both sides", "bold yellow"),
    BF16: ("bf16", "bold red"),
}
"""What is recommended, in words and in the colour of a terminal."""


def print_result(result: ProbeResult, console: Console) -> None:
    console.print(mismatch_table(result))
    for line in _measured_lines(result):
        console.print(line)
    console.print(headroom_table(result))
    _print_recommendation(result, console)


def mismatch_table(result: ProbeResult) -> Table:
    """Build a table with a row for each pair of dtypes, the learner's first; under the mean is its 95 % interval."""
    title = f"d = log π_learner − log μ_sampler; unlikely: log μ < {LOW_LOG_PROB:g}"
    head = ("mean |d|", "max |d|", "mean |Σd|", "k3", "p99 |d|", "unlikely")
    table = Table("π / μ", *head, title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name, figures in result.mismatch.items():
        shown = [figures[metric] for metric in ("max_abs", "seq_mean_abs", "k3", "abs_p99")]
        numbers = (f"{value:.1e}" for value in (*shown, figures["low_probability"]["mean_abs"]))
        mean = Text(f"{figures['mean_abs']:.2e}\n{_interval_text(*figures['mean_abs_interval'])}")
        table.add_row(name, mean, *numbers)
    return table


def _interval_text(low: float, high: float) -> str:
    """Write both ends under one exponent: 2.8–4.8e-03."""
    if not low > 0:
        return f"{low:.1e}–{high:.1e}"
    exponent = math.floor(math.log10(low))
    return f"{low / 10**exponent:.1f}–{high / 10**exponent:.1f}e{exponent:+03d}"


def _measured_lines(result: ProbeResult) -> list[str]:
    floors = ", ".join(f"{dtype} {figures['mean_abs']:.1e}" for dtype, figures in result.noise_floor.items())
    lines = [f"learner against itself, one sequence at a time: mean |d| {floors}"]
    if result.gain:
        low, high = result.gain["interval"]
        lines.append(f"bf16 ÷ fp16: {result.gain['ratio']:.1f} [{low:.1f} … {high:.1f}]")
    sampler, settings = result.settings["sampler"], result.settings
    lines.append(f"sampled by {sampler}: {settings['count']} responses of at most {settings['max_new_tokens']} tokens")
    lines += [f"no sampler in {dtype}: {why}" for dtype, why in result.refusals.items()]
    return lines


def headroom_table(result: ProbeResult) -> Table:
    """Build a table of the modules with the least headroom in each phase."""
    title = "65504 ÷ the largest number of an FP32 run; gradients at the first loss scale"
    table = Table("phase", title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("module (tensor)", overflow="fold")
    table.add_column("largest", no_wrap=True)
    table.add_column("headroom", no_wrap=True)
    for phase in dict.fromkeys(row["phase"] for row in result.headroom):
        for row in [row for row in result.headroom if row["phase"] == phase][:SHOWN_ROWS]:
            where = str(Site(row["phase"], row["module"], row["tensor"]))
            table.add_row(phase, where, f"{row['max_abs']:.3g}", f"{row['headroom']:.3g}")
    return table


def _print_recommendation(result: ProbeResult, console: Console) -> None:
    advice = result.recommendation
    console.print(Text.assemble("recommended: ", VERDICTS[advice.precision]))
    for reason in advice.reasons:
        console.print(f"  {reason}")
    if advice.fp32_modules:
        console.print(f"  in fp32: {', '.join(advice.fp32_modules)}")
        console.print("  fp16_patch does not do that: it would have to hold in the sampler, too")
    if advice.precision != BF16:
        console.print(f"  first loss scale: {advice.init_scale:g}")
    for warning in advice.warnings:
        console.print(f"  warning: {warning}")
