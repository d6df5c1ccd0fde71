"""Measure what the mismatch monitor costs, what it survives, and whether it names what is planted, against bounds.

    python -m integration.bench.monitor                 # everything: about an hour on two cores
    python -m integration.bench.monitor ns_per_token    # the named figures; the others stay as they were

Results go to `out/monitor.json`, each with its bound. Every ratio is of two arms in one run.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from integration.bench import command, monitor_cost, monitor_runs

# Figure → what measures it, given a folder of its own, a seed and a size.
COSTS: dict[str, Callable[[Path, int, monitor_cost.Size], Any]] = {
    "ns_per_token": monitor_cost.ns_per_token,
    "observe_vs_forward": monitor_cost.observe_vs_forward,
    "merge_4096_s": monitor_cost.merge_seconds,
    "root_growth_mb": monitor_cost.root_growth,
}
RUNS: dict[str, Callable[[Path, int, monitor_runs.Size], Any]] = {
    "step_ratio": monitor_runs.step_ratio,
    "faults": monitor_runs.faults,
    "causes": monitor_runs.causes,
}
# (figure, key in it, what it is at most)
BOUNDS = (
    ("ns_per_token", None, 100.0),
    ("observe_vs_forward", "100m", 0.005),
    ("observe_vs_forward", "100m_fp32", 0.005),
    ("observe_vs_forward", "demo", 0.05),
    ("observe_vs_forward", "demo_fp32", 0.05),
    ("merge_4096_s", None, 1.0),
    ("root_growth_mb", None, 10.0),
    ("step_ratio", None, 1.01),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("figures", nargs="*", choices=[[], *COSTS, *RUNS], help="only these")
    arguments = parser.parse_args(argv)
    with command.results_folder(arguments.out, smoke=arguments.smoke) as out:
        result = out / "monitor.json"
        measured: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
        for name in arguments.figures or (*COSTS, *RUNS):
            measured[name] = measure(name, out / "monitor" / name, arguments.seed, smoke=arguments.smoke)
            measured |= {
                "machine": machine(),
                "seed": arguments.seed,
                "command": "python -m integration.bench.monitor",
            }
            command.keep(result, measured)
        show(measured, Console())


def measure(figure: str, out: Path, seed: int, *, smoke: bool) -> Any:
    """Measure one figure, in a folder that is made for it."""
    out.mkdir(parents=True, exist_ok=True)
    if figure in COSTS:
        return COSTS[figure](out, seed, monitor_cost.SMOKE if smoke else monitor_cost.FULL)
    return RUNS[figure](out, seed, monitor_runs.SMOKE if smoke else monitor_runs.FULL)


def machine() -> dict[str, Any]:
    """Say what figures are measured on."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def show(measured: dict[str, Any], console: Console) -> None:
    table = Table("figure", "measured", "at most")
    for name, key, bound in BOUNDS:
        if name in measured:
            value = measured[name] if key is None else measured[name][key]
            table.add_row(f"{name} {key or ''}", f"{value:.4g}", f"{bound:g}")
    for name, reached in measured.get("faults", {}).items():
        table.add_row(f"fault {name} reached training", str(reached), "False")
    for planted, diagnosed in measured.get("causes", {}).items():
        table.add_row(f"planted {planted}", str(diagnosed), monitor_runs.CAUSES[planted].cause)
    console.print(table)


if __name__ == "__main__":
    main()
