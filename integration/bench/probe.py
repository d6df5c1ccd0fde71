"""What the probe finds of models whose answer is known: the unsafe ones located, no alarm on the families people train.

python -m integration.bench.probe
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp16_patch.probe.examining import ProbeRequest, examine
from fp16_patch.probe.result import ProbeResult
from integration.cpu.tiny_families import FAMILIES, UNSAFE, write_family, write_unsafe

RESPONSES, TOKENS = 4, 12


def measure(seed: int) -> dict[str, Any]:
    """`unsafe_located` of `unsafe_total`, `false_alarms` of `families`, and what was found of each."""
    with tempfile.TemporaryDirectory() as folder:
        located = {name: located_at(write_unsafe(name, Path(folder) / name), seed) for name in UNSAFE}
        alarms = {name: alarms_of(write_family(name, Path(folder) / name), seed) for name in FAMILIES}
    return {
        "unsafe_located": sum(found == UNSAFE[name].module for name, found in located.items()),
        "unsafe_total": len(UNSAFE),
        "false_alarms": sum(map(bool, alarms.values())),
        "families": len(FAMILIES),
        "located": located,
        "alarms": alarms,
    }


def located_at(model: Path, seed: int) -> str | None:
    """The first module that is said to overflow."""
    overflows = _probed(model, seed).overflows
    return overflows[0]["module"] if overflows else None


def alarms_of(model: Path, seed: int) -> list[str]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    measured = measure(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "probe.json").write_text(json.dumps(measured, indent=1) + "\n")
    show(measured, Console())


if __name__ == "__main__":
    main()
