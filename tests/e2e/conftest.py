"""How the tests start a framework's command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.cpu.arms import ARMS
from integration.cpu.launch import LaunchConfig, RunResult, run
from integration.demo import task
from tests.conftest import python_of_runs
from tests.e2e.verl_runs import STEPS, TIMEOUT_S


@pytest.fixture(scope="session")
def start_verl(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[..., RunResult]:
    """Run verl with an arm's overrides and further settings."""
    train, val = task.write_dataset(tmp_path_factory.mktemp("data"))

    def started(arm: str, **settings: Any) -> RunResult:
        out = tmp_path_factory.mktemp(arm)
        of_sglang = settings.get("sampler") == "sglang"
        warm = request.getfixturevalue("warm_python_for_sglang" if of_sglang else "warm_python")
        config = LaunchConfig(
            tiny_model,
            train,
            val,
            Path(task.__file__),
            out,
            reward_name="share_of_digits",
            **{"steps": STEPS, "timeout_seconds": TIMEOUT_S, "python": python_of_runs(warm), **settings},
        )
        return run(ARMS[arm].applied_to(config, out) if not config.prefix else config)

    return started
