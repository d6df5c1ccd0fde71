"""The demo: real GRPO by real verl on this CPU, three times on the same data and seeds, in three precisions."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fp16_patch.mismatch.comparison import print_comparison
from fp16_patch.mismatch.page import write_html
from fp16_patch.mismatch.record import RunRecord, load_run
from integration.cpu.arms import ARMS, DEMONSTRATED, Arm, record_of
from integration.cpu.launch import LaunchConfig, run
from integration.demo import make_model, task

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
# From what is drawn, not from what is trained: every arm samples the same prompts in the same order.
SEED = 0
STEPS = 6


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=OUT, help="Where runs and reports go.")
@click.option("--steps", default=STEPS, show_default=True, help="Training steps an arm.")
@click.option("--arm", "names", multiple=True, type=click.Choice(list(ARMS)), help="Only this arm; may be repeated.")
def main(out: Path, steps: int, names: tuple[str, ...]) -> None:
    """Run the arms, print them side by side, write report.json and report.html."""
    console = Console()
    started = time.monotonic()
    config = prepare(out, steps, console)
    walls = {name: run_arm(ARMS[name], config, out, console) for name in names or DEMONSTRATED}
    records = {name: load_run(record_of(out / name)) for name in walls}
    print_comparison(records, console)
    write_report(records, walls, out)
    write_html(records, out / "report.html", "verl on a CPU in three precisions")
    console.print(f"{out / 'report.json'}\n{out / 'report.html'}\n{time.monotonic() - started:.0f} s in all")


def prepare(out: Path, steps: int, console: Console) -> LaunchConfig:
    """Model and data, made once for an output folder; the run they are for."""
    model = out / "model"
    if not (model / "meta.json").is_file():
        console.print("making a small model that can add a little …")
        shutil.rmtree(model, ignore_errors=True)
        make_model.main.callback(model, SEED)  # type: ignore[misc]
    train, val = task.write_dataset(out / "data", seed=SEED)
    return LaunchConfig(model, train, val, Path(task.__file__), out, steps=steps)


def run_arm(arm: Arm, config: LaunchConfig, out: Path, console: Console) -> float:
    """Run one arm to its end; seconds it took.

    Raises:
        SystemExit: the run failed; its reason and the end of its log are printed first.
    """
    shutil.rmtree(out / arm.name, ignore_errors=True)
    with _progress(console) as progress:
        bar = progress.add_task(arm.name, total=config.steps, said="starting verl, Ray and vLLM")
        result = run(arm.applied_to(config, out / arm.name), on_step=_advance(progress, bar))
    if not result.ok:
        console.print(result.tail(), markup=False, highlight=False)
        sys.exit(f"arm {arm.name} failed ({result.reason or f'exit code {result.returncode}'}); log: {result.log}")
    return result.wall_seconds


def write_report(records: dict[str, RunRecord], walls: dict[str, float], out: Path) -> None:
    """Everything measured, by arm."""
    arms = {name: {**record.summary(), "wall_s": round(walls[name], 1)} for name, record in records.items()}
    (out / "report.json").write_text(json.dumps({"version": 1, "arms": arms}, indent=1) + "\n")


def _advance(progress: Progress, bar: Any) -> Callable[[dict[str, Any]], None]:
    def on_step(step: dict[str, Any]) -> None:
        gap, reward = step.get("mismatch/mean_abs"), step.get("critic/score/mean")
        progress.update(bar, completed=step["step"], said=f"mean |d| {gap:.1e}, reward {reward:.2f}")

    return on_step


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description:11}"), BarColumn(30), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[said]}"), console=console)


if __name__ == "__main__":
    main()
