"""Run the arms of a demo side by side: one model for all, each run with its progress, one report of them all."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fp16_patch.mismatch.record.reading import REWARDS, RunRecord, load_run
from fp16_patch.mismatch.report.comparison import print_comparison
from fp16_patch.mismatch.report.page import write_html
from integration.cpu.arms import record_of
from integration.cpu.process import RunResult
from integration.demo import make_model

# From what is drawn, not from what is trained: every arm samples the same prompts in the same order.
SEED = 0
STEPS = 6


def prepare_model(out: Path, console: Console, effort: make_model.Effort = make_model.FULL) -> Path:
    """Make the model of all arms, once for an output folder; returns its folder."""
    model = out / "model"
    if not (model / "meta.json").is_file():
        console.print("making a small model that can add a little …")
        shutil.rmtree(model, ignore_errors=True)
        make_model.make(model, SEED, effort)
    return model


def run_arm(
    name: str,
    start: Callable[[Path, Callable[[dict[str, Any]], None]], RunResult],
    out: Path,
    steps: int,
    console: Console,
    *,
    expected_error: str | None = None,
) -> RunResult:
    """Run one arm to its end in a folder of its own; `start` gets the folder, and what to call after each step.

    Raises:
        SystemExit: the run failed, and not in the way that is expected of it; its end is printed first.
    """
    shutil.rmtree(out / name, ignore_errors=True)
    with _progress(console) as progress:
        bar = progress.add_task(name, total=steps, said="starting the trainer, Ray and vLLM")
        result = start(out / name, _advance(progress, bar))
        if expected_error and expected_error in (result.error or ""):
            progress.update(bar, said=ending(result))
            return result
    if not result.ok or expected_error:
        console.print(result.tail(), markup=False, highlight=False)
        sys.exit(f"arm {name} failed ({result.reason or f'exit code {result.returncode}'}); log: {result.log}")
    return result


def write_reports(results: Mapping[str, RunResult], out: Path, title: str, console: Console) -> None:
    """Print the arms side by side; write report.json, with everything measured by arm, and report.html."""
    records = {name: _with_ending(load_run(record_of(out / name)), result) for name, result in results.items()}
    print_comparison(records, console)
    arms = {
        name: {
            **record.summary(),
            "wall_s": round(results[name].wall_seconds, 1),
            "error": None if results[name].ok else results[name].error,
        }
        for name, record in records.items()
    }
    (out / "report.json").write_text(json.dumps({"version": 1, "arms": arms}, indent=1) + "\n")
    write_html(records, out / "report.html", title)
    console.print(f"{out / 'report.json'}\n{out / 'report.html'}")


def ending(result: RunResult) -> str:
    """Say how a run that failed came to its end."""
    return f"stopped after {len(result.steps)} complete steps: {result.error}"


def _with_ending(record: RunRecord, result: RunResult) -> RunRecord:
    return record if result.ok else replace(record, notes=[ending(result), *record.notes])


def _advance(progress: Progress, bar: Any) -> Callable[[dict[str, Any]], None]:
    def on_step(step: dict[str, Any]) -> None:
        # Of an asynchronous run, what is not drift.
        gap = step.get("mismatch/lag0_mean_abs", step.get("mismatch/mean_abs"))
        reward = next((step[name] for name in REWARDS if name in step), None)
        said = [
            f"mean |d| {gap:.1e}" if gap is not None else None,
            f"reward {reward:.2f}" if reward is not None else None,
        ]
        progress.update(bar, completed=step["step"], said=", ".join(filter(None, said)))

    return on_step


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description:11}"), BarColumn(30), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[said]}"), console=console)
