"""Run the monitor in real verl: what a step costs with it, which accidents reach training, which causes it names."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.record.reading import MISMATCH, load_run
from integration.bench.warm import warm_python
from integration.cpu.arms import ARMS, record_of
from integration.cpu.launch import LaunchConfig, RunResult, run
from integration.demo import make_model, task
from integration.demo.side_by_side import prepare_model

PLANTS = Path(__file__).with_name("planted")
ROLLOUT = "actor_rollout_ref.rollout"


@dataclass(frozen=True)
class Planted:
    """One cause: what is planted or set, and the cause that the diagnosis must name first."""

    cause: str
    plant: str = ""
    overrides: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


CAUSES = {
    "nothing, bf16": Planted("precision"),
    "sampler's temperature": Planted("temperature", "sampler_temperature"),
    "raw log-probs": Planted(
        "raw_log_probs", overrides=(f"{ROLLOUT}.logprobs_mode=raw_logprobs", f"{ROLLOUT}.temperature=0.7")
    ),
    "top-p": Planted("truncated_sampling", overrides=(f"{ROLLOUT}.top_p=0.9",)),
    "top-k": Planted("truncated_sampling", overrides=(f"{ROLLOUT}.top_k=4",)),
    "sync dropped": Planted("stale_weights", "sync_dropped"),
    "sync one step late": Planted("stale_weights", "sync_late"),
    "mask off by one": Planted("mask_shifted", "mask_past_the_end"),
    "log-probs off by one": Planted("mask_shifted", "log_probs_shifted"),
    "sampler in float16, learner in bfloat16": Planted(
        "one_side_lower_precision", overrides=(f"{ROLLOUT}.dtype=float16",)
    ),
    "sampler's NaN": Planted("nonfinite_sampler", "sampler_nan"),
}

# Accident → the plant and the step it happens at; all in one run but the restart, which is a second run.
ACCIDENTS = {
    "root killed": "root_killed@2",
    "aggregator killed": "aggregator_killed@3",
    "disk full": "disk_full@4",
    "slow sink": "slow_sink@6",
    "exception": "monitor_raises@8",
    "NaN": "sampler_nan",
}
ACCIDENT_STEPS = 10


@dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        causes: of `CAUSES`, a run each.
        cause_steps: of each of them.
        timed_steps: of each half of the step-time measurement.
        warm_up_steps: before them, in which everything is loaded.
        model: what is put into the demo's model.
    """

    causes: tuple[str, ...] = tuple(CAUSES)
    cause_steps: int = 5
    timed_steps: int = 40
    warm_up_steps: int = 4
    model: make_model.Effort = make_model.FULL


FULL = Size()
SMOKE = Size(("sampler's NaN",), cause_steps=1, timed_steps=1, warm_up_steps=0, model=make_model.SMOKE)


def causes(out: Path, _seed: int, size: Size) -> dict[str, str]:
    """Plant each cause in a run; returns the cause that is named first, from the run's record alone."""
    return {name: _named_cause(out, name, size) for name in size.causes}


def _named_cause(out: Path, name: str, size: Size) -> str:
    planted = CAUSES[name]
    folder = out / name.replace(" ", "-").replace(",", "").replace("'", "")
    config = _config(out, folder, size.cause_steps, planted.plant, planted.overrides, size.model)
    require_planted(_finished(run(ARMS["bf16"].applied_to(config, folder))), filter(None, [planted.plant]))
    return diagnose_run(load_run(record_of(folder)))[0].cause


def faults(out: Path, _seed: int, size: Size) -> dict[str, bool]:
    """Tell for each accident whether it reached training.

    It did if a step is missing, the run did not end by itself, or a record is lost.

    Raises:
        RuntimeError: an accident did not happen.
    """
    folder = out / "accidents"
    overrides = (f"trainer.save_freq={ACCIDENT_STEPS}",)
    config = _config(out, folder, ACCIDENT_STEPS, ",".join(ACCIDENTS.values()), overrides, size.model)
    first = run(ARMS["bf16"].applied_to(config, folder))
    trained = first.ok and [step["step"] for step in first.steps] == list(range(1, ACCIDENT_STEPS + 1))
    if trained:
        require_planted(first, (accident.partition("@")[0] for accident in ACCIDENTS.values()))
    before = (record_of(folder) / MISMATCH).read_text().splitlines()
    (out / "accidents.json").write_text(json.dumps(_story(before), indent=1))
    return {**dict.fromkeys(ACCIDENTS, not trained), "cluster restart": not _resumed(out, folder, before, size)}


def require_planted(result: RunResult, plants: Iterable[str]) -> None:
    """Require that the run's log has the word of each plant.

    Raises:
        RuntimeError: it has not: the place that the plant takes effect in may have moved.
    """
    log = result.log.read_text(errors="replace")
    if missing := [plant for plant in plants if f"planted: {plant}" not in log]:
        raise RuntimeError(f"planted without effect: {', '.join(missing)}; see {PLANTS} and {result.log}")


def _resumed(out: Path, folder: Path, before: list[str], size: Size) -> bool:
    """Go on from the checkpoint in another cluster: nothing of the record is lost, the new steps are there."""
    steps = ACCIDENT_STEPS + 2
    config = _config(out, folder, steps, "", ("trainer.resume_mode=auto",), size.model)
    second = run(ARMS["bf16"].applied_to(config, folder))
    record = load_run(record_of(folder))
    kept = (record_of(folder) / MISMATCH).read_text().splitlines()[: len(before)] == before
    return second.ok and kept and set(record.mismatch) >= {ACCIDENT_STEPS + 1, steps}


def _story(lines: list[str]) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in lines]
    return [{"step": line["step"], "coverage": line.get("coverage")} for line in parsed]


def step_ratio(out: Path, _seed: int, size: Size) -> float:
    """Time a step with the monitor ÷ without, medians: every other step of one run goes without.

    Raises:
        RuntimeError: the run failed, or its record is not of every other step.
    """
    folder = out / "alternating"
    count = 2 * size.timed_steps + size.warm_up_steps
    config = _config(out, folder, count, "monitor_every_other_step", (), size.model)
    result = _finished(run(ARMS["fp16_patch"].applied_to(config, folder)))
    measured, steps = set(load_run(record_of(folder)).mismatch), result.steps[size.warm_up_steps :]
    if measured != set(range(1, count + 1, 2)):
        raise RuntimeError(f"the monitor was to measure every other step, and measured {sorted(measured)}")
    seconds = {on: [step["timing_s/step"] for step in steps if step["step"] % 2 == on] for on in (0, 1)}
    (out / "step_times.json").write_text(json.dumps(seconds))
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


def _config(
    out: Path, folder: Path, steps: int, plant: str, overrides: tuple[str, ...], effort: make_model.Effort
) -> LaunchConfig:
    model = prepare_model(out.parent, Console(), effort)
    train, val = task.write_dataset(out.parent / "data")
    env = {
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,planted_in_verl",
        "PYTHONPATH": str(PLANTS),
        "PLANTED": plant,
        "PLANTED_LOG": str(record_of(folder) / MISMATCH),
    }
    timeout = 300.0 + 30.0 * steps
    return LaunchConfig(
        model,
        train,
        val,
        Path(task.__file__),
        folder,
        steps=steps,
        overrides=overrides,
        python=warm_python(),
        env=env,
        timeout_seconds=timeout,
    )


def _finished(result: RunResult) -> RunResult:
    if not result.ok:
        raise RuntimeError(f"{result.reason or result.returncode}\n{result.tail()}")
    return result
