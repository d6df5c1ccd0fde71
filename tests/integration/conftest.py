"""The one real run of verl that all smokes share, and the one vLLM."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.bench.command import OUT, Bench
from tests.integration.lending import LendingBench, LendingSampler, lend_run, require_verl_command
from tests.integration.smokes import smoke

PLANTS = OUT.parent / "planted"
STEPS = 10
# Those of step n happen in it; even steps go without the monitor, so its own are of odd ones.
ACCIDENTS = ("root_killed@2", "aggregator_killed@3", "disk_full@5", "slow_sink@7", "monitor_raises@5")
PLANTED = (*ACCIDENTS, "sampler_nan", "monitor_every_other_step")


@pytest.fixture(scope="session")
def planted_run(tiny_model: Path, warm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A learner in float16 and a sampler in bfloat16, with every accident planted."""
    pytest.importorskip("verl")
    from integration.cpu.arms import record_of
    from integration.cpu.launch import LaunchConfig, run
    from integration.demo import task

    train, val = task.write_dataset(tmp_path_factory.mktemp("planted_data"))
    out = tmp_path_factory.mktemp("planted")
    env = {
        "FP16_PATCH": "fp16",
        "BENCH_SAMPLER": "bf16",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,planted_in_verl,sampler_apart",
        "PYTHONPATH": str(PLANTS),
        "PLANTED": ",".join(PLANTED),
        "PLANTED_LOG": str(record_of(out) / "mismatch.jsonl"),
    }
    return run(
        LaunchConfig(
            tiny_model,
            train,
            val,
            Path(task.__file__),
            out,
            reward_name="share_of_digits",
            steps=STEPS,
            prompts_per_step=4,
            python=warm_python,
            env=env,
            timeout_seconds=900,
        )
    )


@pytest.fixture(scope="session")
def lending_sampler() -> LendingSampler:
    """Is asked in place of the probe's vLLM."""
    return LendingSampler()


@pytest.fixture(scope="session")
def lending_bench() -> LendingBench:
    """Keeps the figures of the smokes."""
    return LendingBench()


@pytest.fixture
def start_smoke(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Start a module's smallest form; whatever it asks of real verl or vLLM is lent."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from fp16_patch.probe import vllm_sampler
    from integration.cpu import launch

    run = launch.run

    def lent(config: Any, on_step: Any = None) -> Any:
        require_verl_command(launch.command(config, config.out), launch.environment(config))
        return lend_run(request.getfixturevalue("planted_run"), config, on_step)

    def started(module: str) -> str:
        __import__(module)
        monkeypatch.setattr(vllm_sampler, "sample", request.getfixturevalue("lending_sampler").sample)
        figures = request.getfixturevalue("lending_bench").figures
        monkeypatch.setattr(Bench, "figures", lambda bench, work, seed, size: figures(bench, work, seed, size))
        for name, loaded in list(sys.modules.items()):
            if name.startswith("integration.") and getattr(loaded, "run", None) is run and loaded is not launch:
                monkeypatch.setattr(loaded, "run", lent)
            if name.startswith("integration.bench.") and hasattr(loaded, "warm_python"):
                monkeypatch.setattr(loaded, "warm_python", lambda: Path(sys.executable))
        return smoke(module, capsys)

    return started
