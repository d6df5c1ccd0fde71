"""Train with real verl for a bench: start on the demo's task, read the record, keep it by its settings."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fp16_patch.mismatch.record.reading import REWARDS, RunRecord, load_run
from fp16_patch.probe.result import finite
from integration.bench.solvable import ProblemSet
from integration.bench.warm import warm_python
from integration.cpu.arms import record_of
from integration.cpu.launch import LaunchConfig, run
from integration.demo import task

# Curve → the names under which a run has it; a run that scales no loss has neither of the last two.
CURVES = {
    "reward": REWARDS,
    "mean_abs": ("mismatch/mean_abs",),
    "seq_mean_abs": ("mismatch/seq_mean_abs",),
    "k3": ("mismatch/k3",),
    "grad_norm": ("actor/grad_norm",),
    "skipped": ("fp16/step_skipped",),
    "loss_scale": ("fp16/loss_scale",),
}
ENDS = ("reward", "mean_abs", "seq_mean_abs", "k3")
SIGNIFICANT = 5
RESULT = "run.json"

Curve = list[float | None]


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters, the same for every arm of a comparison.

    Attributes:
        updates: how often a step's rollouts are learned from, a part each time: all but the first are off-policy.
    """

    steps: int
    learning_rate: float = 1e-4
    prompts_a_step: int = 8
    samples_a_prompt: int = 8
    updates: int = 2


SMOKE = Settings(steps=1, samples_a_prompt=4)


@dataclass(frozen=True)
class Training:
    """What differs between the trainings of a comparison: hydra overrides, environment, and the seed of all draws."""

    name: str
    seed: int
    overrides: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def trained(
    training: Training, settings: Settings, model: Path, problems: ProblemSet, folder: Path, console: Console
) -> dict[str, Any]:
    """Train, and return curves, ledger and seconds; a training of the same settings in `folder` is not repeated.

    Raises:
        RuntimeError: the run failed; the message has its end.
    """
    made_of = _made_of(training, settings, problems)
    out, result = folder / training.name, folder / training.name / RESULT
    if (known := _kept(result, made_of)) is not None:
        return known
    # A record that was begun would go on.
    shutil.rmtree(out, ignore_errors=True)
    with console.status(f"{training.name}: starting the trainer, Ray and vLLM") as status:
        ended = run(
            config_of(training, settings, model, problems, out),
            lambda step: status.update(f"{training.name}: step {step['step']} of {settings.steps}"),
        )
    if not ended.ok:
        raise RuntimeError(f"{training.name}: {ended.reason or ended.returncode}\n{ended.tail()}")
    record = load_run(record_of(out))
    found: dict[str, Any] = finite(
        {
            "curves": curves_of(record, settings.steps),
            "mismatch": record.summary()["mismatch"],
            "tokens": record.total().tokens,
            "ledger": record.ledger,
            "processes": record.processes,
            "seconds": round(ended.wall_seconds),
            "ready_seconds": None if ended.ready_seconds is None else round(ended.ready_seconds),
        }
    )
    result.write_text(json.dumps({"made_of": made_of, "run": found}) + "\n")
    console.print(f"{training.name}: {found['seconds']} s")
    return found


def config_of(training: Training, settings: Settings, model: Path, problems: ProblemSet, out: Path) -> LaunchConfig:
    """Return the run of verl that this training is."""
    return LaunchConfig(
        model,
        problems.train,
        problems.val,
        Path(task.__file__),
        out,
        steps=settings.steps,
        prompts_per_step=settings.prompts_a_step,
        responses_per_prompt=settings.samples_a_prompt,
        learning_rate=settings.learning_rate,
        python=warm_python(),
        overrides=(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={settings.prompts_a_step // settings.updates}",
            *seeded(training.seed),
            *training.overrides,
        ),
        env=training.env,
        timeout_seconds=300.0 + 60.0 * settings.steps,
    )


def seeded(seed: int) -> tuple[str, ...]:
    """Seed the order of the problems, vLLM's draws and the order of the mini-batches, not the model or the problems."""
    return (
        f"data.seed={seed}",
        f"actor_rollout_ref.rollout.seed={seed}",
        f"actor_rollout_ref.actor.data_loader_seed={seed}",
        f"actor_rollout_ref.actor.fsdp_config.seed={seed}",
    )


def curves_of(record: RunRecord, steps: int) -> dict[str, Curve]:
    """Read the values of steps 1, 2, … of each curve, None where there is none; empty if the run has no such figure."""
    return {name: _curve(record, names, steps) for name, names in CURVES.items()}


def _curve(record: RunRecord, names: Sequence[str], steps: int) -> Curve:
    series = next((series for name in names if (series := record.series(name))), {})
    return [_short(series.get(step)) for step in range(1, steps + 1)] if series else []


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{SIGNIFICANT}g}")


def mean(curve: Sequence[float | None]) -> float:
    """Average the values that are there; NaN where there is none."""
    values = [value for value in curve if value is not None]
    return statistics.fmean(values) if values else math.nan


def ends(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Average over the last quarter of the steps, the reward over the first, too."""
    quarter = max(1, len(curves["reward"]) // 4)
    return {name: mean(curves[name][-quarter:]) for name in ENDS} | {"start_reward": mean(curves["reward"][:quarter])}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the mean, the least and the greatest."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def _made_of(training: Training, settings: Settings, problems: ProblemSet) -> dict[str, Any]:
    made_of = {"training": asdict(training), "settings": asdict(settings), "problems": problems.facts}
    # As it reads back: lists where there were tuples.
    read: dict[str, Any] = json.loads(json.dumps(made_of))
    return read


def _kept(result: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """Read the run in `result`, if there is one and it was made of the same."""
    if not result.is_file():
        return None
    kept = json.loads(result.read_text())
    return dict(kept["run"]) if kept["made_of"] == made_of else None
