"""Lend what a real framework has answered once to all who ask for as much: starting it takes most of a smoke's time.

A run of verl is lent in its first steps. What differs between the runs that benches ask for is checked all the same:
the command line must compose in verl, and the environment must be a plan.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fp16_patch.plan.plan import Plan
from fp16_patch.probe import vllm_sampler
from integration.bench.command import Bench
from integration.cpu.arms import record_of
from integration.cpu.process import RunResult

OnStep = Callable[[dict[str, Any]], None]
_MAIN_PPO = "verl.trainer.main_ppo"


def lend_run(kept: RunResult, config: Any, on_step: OnStep | None) -> RunResult:
    """Put what a run has left into the folder of another that was asked for, as far as its steps go."""
    left_out = shutil.ignore_patterns("ray", "hydra", "*.pipe")
    steps = [step for step in kept.steps if step["step"] <= config.steps]
    shutil.copytree(kept.log.parent, config.out, dirs_exist_ok=True, ignore=left_out)
    for lines in record_of(config.out).glob("*.jsonl"):
        recorded = lines.read_text(encoding="utf-8").splitlines(keepends=True)
        lines.write_text("".join(line for line in recorded if json.loads(line)["step"] <= config.steps))
    for step in steps:
        (on_step or (lambda _step: None))(step)
    return replace(kept, steps=steps, log=config.out / kept.log.name)


def require_verl_command(command: Sequence[str], environment: dict[str, str]) -> None:
    """Require that verl composes the command line, and that the environment names a plan."""
    from hydra import compose, initialize_config_module

    overrides = list(command[command.index(_MAIN_PPO) + 1 :])
    with initialize_config_module("verl.trainer.config", version_base=None):
        compose(config_name="ppo_trainer", overrides=overrides)
    Plan.from_environment(environment)


class LendingBench:
    """Figures of a bench in its smallest form: what one has measured is lent to those that are made of several."""

    def __init__(self) -> None:
        self._real, self._kept = Bench.figures, {}

    def figures(self, bench: Bench[Any], work: Path, seed: int, size: Any) -> Any:
        if bench.name not in self._kept:
            self._kept[bench.name] = self._real(bench, work, seed, size)
        return self._kept[bench.name]


class LendingSampler:
    """vLLM as the probe's sampler: the first answer to some prompts is lent to all dtypes and models."""

    def __init__(self) -> None:
        self._real, self._kept = vllm_sampler.sample, {}

    def sample(self, model: Path, prompts: Sequence[Sequence[int]], dtype: str, sampling: Any, watch: bool) -> Any:
        key = tuple(map(tuple, prompts)), sampling, watch
        if key not in self._kept:
            self._kept[key] = self._real(model, prompts, dtype, sampling, watch)
        return self._kept[key]
