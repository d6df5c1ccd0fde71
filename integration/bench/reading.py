"""Measure what it takes to read long records and large files of log-probs: seconds of a core, and memory.

    python -m integration.bench.reading

Each command runs in a process of its own, from its command line, as a person types it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fp16_patch.mismatch.record.reading import LEDGER, MISMATCH, PLAN, STEPS
from fp16_patch.mismatch.statistics.summary import MismatchStats
from integration.bench.command import Bench

# Runs a command, then says what it took; the least that a process can do besides.
MEASURED = """
import json, resource, runpy, sys
sys.argv = ["fp16-patch", *sys.argv[1:]]
try:
    runpy.run_module("fp16_patch.cli", run_name="__main__")
except SystemExit as ended:
    code = ended.code
used = resource.getrusage(resource.RUSAGE_SELF)
found = {"exit_code": code or 0, "seconds": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}
print(json.dumps(found), file=sys.stderr)
"""

STATES = 16
"""Distinct steps of a record, of which the others are copies."""

STEP_METRICS = 60
DIGITS = 6


@dataclass(frozen=True)
class Size:
    """How much is read.

    Attributes:
        record_steps: of a record, each of `record_sequences` sequences of `record_tokens` tokens.
        dump_steps: of a file of log-probs, each of one token.
        dump_tokens: of another file, in sequences of `dump_length` tokens.
    """

    record_steps: int = 100_000
    record_sequences: int = 4
    record_tokens: int = 16
    dump_steps: int = 20_000
    dump_tokens: int = 7_000_000
    dump_length: int = 1_000


FULL = Size()
SMOKE = Size(record_steps=30, dump_steps=30, dump_tokens=200, dump_length=20)


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Write what is to be read, and read it with the commands."""
    record, steps, tokens = out / "run", out / "steps.jsonl", out / "tokens.jsonl"
    write_record(record, seed, size)
    write_lines(steps, seed, [(step, 1) for step in range(size.dump_steps)])
    write_lines(tokens, seed, [(0, size.dump_length)] * (size.dump_tokens // size.dump_length))
    page = out / "page.html"
    found = {
        "report of many steps": {"steps": size.record_steps, **read("report", record, "--html", page)},
        "analyze of many steps": {"steps": size.dump_steps, **read("analyze", steps)},
        "analyze of many tokens": {"tokens": size.dump_tokens, **read("analyze", tokens)},
    }
    megabytes = {"report of many steps": _megabytes(record), "page": _megabytes(page)}
    megabytes |= {"analyze of many steps": _megabytes(steps), "analyze of many tokens": _megabytes(tokens)}
    for path in (steps, tokens, page, *record.iterdir()):
        path.unlink()
    page_mb = megabytes.pop("page")
    found = {name: {"file_mb": megabytes[name], **figures} for name, figures in found.items()}
    found["report of many steps"]["page_mb"] = page_mb
    return found


def write_record(folder: Path, seed: int, size: Size) -> None:
    """Write a record as a monitored run leaves it."""
    folder.mkdir(exist_ok=True)
    (folder / PLAN).write_text(json.dumps({"mode": "fp16", "dtype": "float16"}))
    roles = {"actor": {"activation": ["float16"]}, "rollout": {"engine_weight": ["float16"]}}
    (folder / LEDGER).write_text(json.dumps({"processes": [{"rank": 0, "roles": roles}], "roles": roles}))
    generator = torch.Generator().manual_seed(seed)
    measured = [_measured(generator, size) for _ in range(STATES)]
    with (folder / MISMATCH).open("w") as mismatch, (folder / STEPS).open("w") as steps:
        for step in range(1, size.record_steps + 1):
            head = f'{{"step": {step}, "time": {1e9 + step}, "attempt": "a", '
            mismatch.write(f"{head}{measured[step % STATES]}}}\n")
            named = {f"timing_s/{number}": step / (number + 1) for number in range(STEP_METRICS)}
            named |= {"critic/score/mean": step / size.record_steps, "fp16/loss_scale": 65536.0}
            steps.write(f'{head}"metrics": {json.dumps(named)}}}\n')


def _measured(generator: torch.Generator, size: Size) -> str:
    shape = (size.record_sequences, size.record_tokens)
    sampler = -8 * torch.rand(shape, generator=generator, dtype=torch.float64).pow(3)
    learner = sampler + 1e-3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    stats = MismatchStats.from_log_probs(sampler, learner.clamp(max=0), torch.ones(shape))
    tokens = size.record_sequences * size.record_tokens
    coverage = {"tokens": tokens, "expected_tokens": tokens, "ranks": 1, "expected_ranks": 1, "complete": True}
    fields = {"metrics": stats.metrics(), "state": stats.to_dict(), "coverage": coverage, "alerts": []}
    return json.dumps(fields)[1:-1]


def write_lines(path: Path, seed: int, sequences: list[tuple[int, int]]) -> None:
    """Write log-probs as any trainer may: a line a sequence, of (step, tokens)."""
    draw = random.Random(seed)
    with path.open("w") as lines:
        for step, tokens in sequences:
            lines.write(json.dumps({"step": step, **dict(_sides(draw, tokens))}) + "\n")


def _sides(draw: random.Random, tokens: int) -> Iterator[tuple[str, list[float]]]:
    sampler = [round(-draw.expovariate(2.0), DIGITS) for _ in range(tokens)]
    yield "sampler_log_probs", sampler
    yield "learner_log_probs", [round(min(0.0, value + draw.gauss(0, 1e-3)), DIGITS) for value in sampler]


def read(*arguments: object) -> dict[str, float]:
    """Run a command; returns its seconds of a core and its memory at most, in MB.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    lines = ended.stderr.splitlines()
    found: dict[str, float] = json.loads(lines[-1]) if lines and ended.returncode == 0 else {"exit_code": 1}
    if found.pop("exit_code"):
        raise RuntimeError(f"fp16-patch {arguments[0]} failed:\n{ended.stdout}\n{ended.stderr}")
    return {name: round(value, 1) for name, value in found.items()}


def _megabytes(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files) / 2**20, 1)


def show(measured: dict[str, Any], console: Console) -> None:
    table = Table("reading", "file", "seconds of a core", "memory at most")
    for name, figures in measured.items():
        table.add_row(name, f"{figures['file_mb']} MB", f"{figures['seconds']}", f"{figures['peak_mb']} MB")
    console.print(table)


BENCH = Bench("reading", measure, show, FULL, SMOKE)

if __name__ == "__main__":
    BENCH.main(__doc__)
