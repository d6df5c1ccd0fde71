"""Plant what goes wrong in a job: state files, gradients, ranks and the monitor's processes; say what came of it.

    python -m integration.bench.faults

Learners are verl's own FSDP engine on two gloo ranks, with a scaler's checkpoint to go on from; the monitor runs in a
local Ray. Results go to `out/faults.json`: fault → what happened on each rank, how long it took in seconds, whether it
`reached_training`, and whether it was `silent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from integration.bench import monitor_faults, worker_faults
from integration.bench.command import Bench


@dataclass(frozen=True)
class Size:
    """Which faults are planted."""

    workers: Sequence[str] = tuple(worker_faults.FAULTS)
    monitor: Sequence[str] = tuple(monitor_faults.FAULTS)


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Plant each fault by itself; count those that reached training, and those that nobody was told of."""
    found = {
        **{name: worker_faults.planted(out, name, seed) for name in size.workers},
        **monitor_faults.planted(out, size.monitor),
    }
    return {
        "faults": found,
        "reached_training": sum(fault["reached_training"] for fault in found.values()),
        "silent": sum(fault["silent"] for fault in found.values()),
    }


def show(measured: dict[str, Any], console: Console) -> None:
    table = Table("planted", "what happened, by rank", "seconds", "reached training", "silent")
    for name, fault in measured["faults"].items():
        words = escape("; ".join(dict.fromkeys(fault["ranks"])))
        table.add_row(
            name, words, f"{fault['seconds']:.1f}", *(_yes(fault[key]) for key in ("reached_training", "silent"))
        )
    console.print(table)
    console.print(f"reached training: {measured['reached_training']}, silent: {measured['silent']}")


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


BENCH = Bench(
    "faults",
    measure,
    show,
    full=Size(),
    smoke=Size(workers=("scale NaN in rank 0's file",), monitor=("a sink raises",)),
)

if __name__ == "__main__":
    BENCH.main(__doc__)
