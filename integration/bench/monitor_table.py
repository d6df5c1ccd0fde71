"""The tables of what the mismatch monitor costs, survives and names, from `out/monitor.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HEAD = ("| | measured |", "|---|---|")
MODELS = {"100m": "111 M parameters", "demo": "the demo's 1.35 M parameters"}


def rows(results: Mapping[str, Any]) -> Iterator[str]:
    """What it costs and what it survives; what was not measured has no row."""
    yield from HEAD
    for name, model in MODELS.items():
        if name in (shares := results.get("observe_vs_forward", {})):
            both = ", ".join(_share(shares[key]) for key in (name, f"{name}_fp32"))
            yield _row(f"time to observe a batch ÷ the learner's log-prob forward in BF16, in FP32: {model}", both)
    if "ns_per_token" in results:
        yield _row("time to observe a token, on one core", f"{results['ns_per_token']:.0f} ns")
    if "merge_4096_s" in results:
        last = "from the last of 4096 simulated ranks' reports to the merged record on disk"
        yield _row(last, f"{results['merge_4096_s']:.2f} s")
    if "root_growth_mb" in results:
        yield _row("memory that the collecting actor gains in 1000 steps", f"{results['root_growth_mb']:.1f} MB")
    if "step_ratio" in results:
        yield _row("step time with ÷ without it, in one verl run, every other step", f"{results['step_ratio']:.3f}")
    if faults := results.get("faults"):
        reached = [name for name, disturbed in faults.items() if disturbed]
        yield _row(f"planted accidents that reached training: {', '.join(faults)}", _of(reached, len(faults)))


def causes(found: Mapping[str, str]) -> Iterator[str]:
    """What was planted in a real run, and what the diagnosis called it."""
    yield from ("| planted in a real verl run | first finding |", "|---|---|")
    for planted, named in found.items():
        yield f"| {planted} | `{named}` |"


def _row(what: str, measured: str) -> str:
    return f"| {what} | {measured} |"


def _share(ratio: float) -> str:
    return f"{ratio:.4f}" if ratio < 0.005 else f"{ratio:.3f}"


def _of(named: list[str], count: int) -> str:
    return f"{len(named)} of {count}: {', '.join(named)}" if named else f"none of {count}"
