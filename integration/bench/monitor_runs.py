"""The monitor in real verl runs: what a step costs with it, which accidents reach training, which causes it names."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.record.reading import MISMATCH, load_run
from integration.cpu.arms import ARMS, record_of
from integration.cpu.launch import LaunchConfig, RunResult, run
from integration.demo import task
from integration.demo.side_by_side import prepare_model

PLANTS = Path(__file__).with_name("planted")
ROLLOUT = "actor_rollout_ref.rollout"
CAUSE_STEPS = 5
# Steps of each half of the step-time measurement, after those in which everything is loaded.
TIMED_STEPS, WARM_UP_STEPS = 40, 4


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


def causes(out: Path, _seed: int) -> dict[str, str]:
    """Planted → the cause that is named first, from the run's record alone."""
    return {name: diagnose_run(load_run(record_of(_cause_run(out, name).log.parent)))[0].cause for name in CAUSES}


def _cause_run(out: Path, name: str) -> RunResult:
    planted = CAUSES[name]
    folder = out / name.replace(" ", "-").replace(",", "").replace("'", "")
    config = _config(out, folder, CAUSE_STEPS, planted.plant, planted.overrides)
    return _finished(run(ARMS["bf16"].applied_to(config, folder)))


def faults(out: Path, _seed: int) -> dict[str, bool]:
    """Accident → whether it reached training: a step missing, a run that did not end by itself, or a lost record."""
    folder = out / "accidents"
    plants = ",".join(ACCIDENTS.values())
    log = record_of(folder) / MISMATCH
    config = _config(out, folder, ACCIDENT_STEPS, plants, (f"trainer.save_freq={ACCIDENT_STEPS}",), log)
    first = run(ARMS["bf16"].applied_to(config, folder))
    trained = first.ok and [step["step"] for step in first.steps] == list(range(1, ACCIDENT_STEPS + 1))
    before = log.read_text().splitlines()
    (out / "accidents.json").write_text(json.dumps(_story(before), indent=1))
    return {**dict.fromkeys(ACCIDENTS, not trained), "cluster restart": not _resumed(out, folder, before)}


def _resumed(out: Path, folder: Path, before: list[str]) -> bool:
    """Another cluster goes on from the checkpoint: nothing of the record is lost, the new steps are there."""
    steps = ACCIDENT_STEPS + 2
    config = _config(out, folder, steps, "", ("trainer.resume_mode=auto",))
    second = run(ARMS["bf16"].applied_to(config, folder))
    record = load_run(record_of(folder))
    kept = (record_of(folder) / MISMATCH).read_text().splitlines()[: len(before)] == before
    return second.ok and kept and set(record.mismatch) >= {ACCIDENT_STEPS + 1, steps}


def _story(lines: list[str]) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in lines]
    return [{"step": line["step"], "coverage": line.get("coverage")} for line in parsed]


def step_ratio(out: Path, _seed: int) -> float:
    """Median step time with the monitor ÷ without: every other step of one run goes without."""
    folder = out / "alternating"
    config = _config(out, folder, 2 * TIMED_STEPS + WARM_UP_STEPS, "monitor_every_other_step", ())
    steps = _finished(run(ARMS["fp16_patch"].applied_to(config, folder))).steps[WARM_UP_STEPS:]
    seconds = {on: [step["timing_s/step"] for step in steps if step["step"] % 2 == on] for on in (0, 1)}
    (out / "step_times.json").write_text(json.dumps(seconds))
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


def _config(
    out: Path, folder: Path, steps: int, plant: str, overrides: tuple[str, ...], log: Path | None = None
) -> LaunchConfig:
    model = prepare_model(out.parent, Console())
    train, val = task.write_dataset(out.parent / "data")
    env = {
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,planted_in_verl",
        "PYTHONPATH": str(PLANTS),
        "PLANTED": plant,
        "PLANTED_LOG": str(log),
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
        env=env,
        timeout_seconds=timeout,
    )


def _finished(result: RunResult) -> RunResult:
    if not result.ok:
        raise RuntimeError(f"{result.reason or result.returncode}\n{result.tail()}")
    return result
