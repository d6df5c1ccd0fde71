"""verl's asynchronous trainers from their own command lines, stock: they take steps on samples of older weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
pytest.importorskip("vllm")

from integration.cpu.launch import RunResult
from tests.e2e.verl_runs import TIMEOUT_S

STEPS = 3
# Long enough for a weight update to come while they are sampled, few enough for a step to be quick.
LONG_RESPONSES = {"prompts_per_step": 8, "responses_per_prompt": 2, "max_response_tokens": 256}


@pytest.fixture(scope="session")
def start_async(start_verl: Callable[..., RunResult]) -> Callable[..., RunResult]:
    """Run one of verl's asynchronous trainers as it is, and see that it has ended well."""

    def started(trainer: str, **settings: Any) -> RunResult:
        result = start_verl("bf16", trainer=trainer, steps=STEPS, **{**LONG_RESPONSES, **settings})
        assert result.ok, f"{result.reason}\n{result.tail(60)}"
        return result

    return started


@pytest.fixture(scope="session")
def colocate_async(start_async: Callable[..., RunResult]) -> RunResult:
    return start_async("colocate_async")


@pytest.mark.timeout(TIMEOUT_S)
def test_colocated_samplers_go_on_while_the_learner_learns(colocate_async: RunResult) -> None:
    assert trained_steps(colocate_async) == [1, 2, 3]
    # What was begun before a step and was not needed for it is older than the weights of the next.
    assert max(values(colocate_async, "training/off_policy/trajectory_staleness_worst/max")) >= 1


def trained_steps(result: RunResult) -> list[int]:
    return [step["step"] for step in result.steps if "actor/grad_norm" in step]


def values(result: RunResult, metric: str) -> Iterable[float]:
    return [step[metric] for step in result.steps if metric in step]
