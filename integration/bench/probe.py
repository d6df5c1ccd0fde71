"""Probe models whose answer is known: the unsafe ones must be located, families people train must raise no alarm.

python -m integration.bench.probe
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp16_patch.probe.examining import ProbeRequest, examine
from fp16_patch.probe.result import ProbeResult
from integration.bench.command import Bench
from integration.cpu.tiny_families import FAMILIES, UNSAFE, write_family, write_unsafe

RESPONSES, TOKENS = 4, 12


@dataclass(frozen=True)
class Size:
    """The models that are probed."""

    unsafe: tuple[str, ...] = tuple(UNSAFE)
    families: tuple[str, ...] = tuple(FAMILIES)


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Count `unsafe_located` of `unsafe_total` and `false_alarms` of `families`; and what was found of each."""
    located = {name: located_at(write_unsafe(name, out / "unsafe" / name), seed) for name in size.unsafe}
    alarms = {name: alarms_of(write_family(name, out / "families" / name), seed) for name in size.families}
    return {
        "unsafe_located": sum(found == UNSAFE[name].module for name, found in located.items()),
        "unsafe_total": len(located),
        "false_alarms": sum(map(bool, alarms.values())),
        "families": len(alarms),
        "located": located,
        "alarms": alarms,
    }


def located_at(model: Path, seed: int) -> str | None:
    """Name the first module that is said to overflow."""
    overflows = _probed(model, seed).overflows
    return overflows[0]["module"] if overflows else None


def alarms_of(model: Path, seed: int) -> list[str]:
    """List what the probe says of each overflow."""
    return [overflow["text"] for overflow in _probed(model, seed).overflows]


def _probed(model: Path, seed: int) -> ProbeResult:
    return examine(
        ProbeRequest(model, sampler="hf", dtypes=("fp32",), count=RESPONSES, max_new_tokens=TOKENS, seed=seed)
    )


def show(measured: dict[str, Any], console: Console) -> None:
    table = Table("made unsafe", "in", "located")
    for name, found in measured["located"].items():
        table.add_row(name, UNSAFE[name].module, str(found))
    console.print(table)
    console.print(f"false alarms: {measured['false_alarms']} of {measured['families']} families")


BENCH = Bench("probe", measure, show, full=Size(), smoke=Size(("mlp",), ("qwen2",)))

if __name__ == "__main__":
    BENCH.main(__doc__)
