"""Run the demo: real GRPO by real verl on this CPU, three times on the same data and seeds, in three precisions.

python -m integration.demo.run
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from integration.bench import command
from integration.cpu.arms import ARMS, DEMONSTRATED, DEMONSTRATED_ASYNCHRONOUS, DEMONSTRATED_ON_MEGATRON
from integration.cpu.launch import LaunchConfig, Sampler, Strategy, run
from integration.cpu.trainers import Trainer
from integration.demo import make_model, task
from integration.demo.side_by_side import SEED, STEPS, prepare_model, run_arm, write_reports

OUT = Path(__file__).resolve().parent / "out"
SAMPLERS: dict[Sampler, str] = {"vllm": "vLLM", "sglang": "SGLang"}
# In verl's `separate_async` a trainer with samplers on devices of their own, all else in its V1 trainer.
TRAINERS: tuple[Trainer, ...] = ("sync", "colocate_async", "separate_async")
LEARNERS: dict[Strategy, str] = {"fsdp": "FSDP", "fsdp2": "FSDP2", "megatron": "Megatron", "veomni": "VeOmni"}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=OUT, help="Where runs and reports go.")
@click.option("--steps", default=STEPS, show_default=True, help="Training steps an arm.")
@click.option("--arm", "names", multiple=True, type=click.Choice(list(ARMS)), help="Only this arm; may be repeated.")
@click.option("--smoke", is_flag=True, help=command.SMOKE_HELP)
@click.option("--sampler", type=click.Choice(list(SAMPLERS)), default="vllm", show_default=True)
@click.option("--learner", type=click.Choice(list(LEARNERS)), default="fsdp", show_default=True)
@click.option("--trainer", type=click.Choice(TRAINERS), default="sync", show_default=True)
def main(
    out: Path,
    steps: int,
    names: tuple[str, ...],
    smoke: bool,
    sampler: Sampler,
    learner: Strategy,
    trainer: Trainer,
) -> None:
    """Run the arms, print them side by side, write report.json and report.html."""
    with command.results_folder(out, smoke=smoke) as folder:
        if smoke:
            compare(folder, 1, ("fp16_patch",), make_model.SMOKE, sampler, learner, trainer)
        else:
            compare(folder, steps, names or _shown(learner, trainer), make_model.FULL, sampler, learner, trainer)


def _shown(learner: Strategy, trainer: Trainer) -> tuple[str, ...]:
    if trainer != "sync":
        return DEMONSTRATED_ASYNCHRONOUS
    return DEMONSTRATED_ON_MEGATRON if learner == "megatron" else DEMONSTRATED


def compare(
    out: Path,
    steps: int,
    names: Sequence[str],
    effort: make_model.Effort,
    sampler: Sampler,
    learner: Strategy,
    trainer: Trainer,
) -> None:
    """Run these arms on one model and report them."""
    console = Console()
    started = time.monotonic()
    config = replace(prepare(out, steps, console, effort), sampler=sampler, strategy=learner, trainer=trainer)
    results = {
        name: run_arm(
            name,
            lambda folder, on_step, arm=ARMS[name]: run(arm.applied_to(config, folder), on_step),
            out,
            steps,
            console,
        )
        for name in names
    }
    kind = "" if trainer == "sync" else f" ({trainer})"
    title = f"verl{kind} with {LEARNERS[learner]} and {SAMPLERS[sampler]} on a CPU, precision by precision"
    write_reports(results, out, title, console)
    console.print(f"{time.monotonic() - started:.0f} s in all")


def prepare(out: Path, steps: int, console: Console, effort: make_model.Effort = make_model.FULL) -> LaunchConfig:
    """Make model and data, once for an output folder; returns the run they are for."""
    model = prepare_model(out, console, effort)
    train, val = task.write_dataset(out / "data", seed=SEED)
    return LaunchConfig(model, train, val, Path(task.__file__), out, steps=steps)


if __name__ == "__main__":
    main()
