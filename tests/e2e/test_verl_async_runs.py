"""verl's asynchronous trainers from their own command lines, stock: they take steps on samples of older weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
pytest.importorskip("vllm")

from integration.cpu.launch import RunResult
from tests.e2e.verl_runs import TIMEOUT_S

STEPS = 3
OFF_POLICY = "training/off_policy"
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


@pytest.fixture(scope="session")
def separate_async(start_async: Callable[..., RunResult]) -> RunResult:
    """Two samplers apart, two batches a step."""
    return start_async("separate_async", standalone_samplers=2, updates_per_sync=2)


@pytest.mark.timeout(TIMEOUT_S)
def test_colocated_samplers_go_on_with_newer_weights_where_a_step_has_stopped_them(colocate_async: RunResult) -> None:
    assert trained_steps(colocate_async) == [1, 2, 3]
    assert max(values(colocate_async, f"{OFF_POLICY}/trajectory_staleness_worst/max")) >= 1
    assert max(values(colocate_async, f"{OFF_POLICY}/trajectory_spans/max")) >= 2


@pytest.mark.timeout(TIMEOUT_S)
def test_samplers_apart_work_ahead_of_the_learner(separate_async: RunResult) -> None:
    assert trained_steps(separate_async) == [1, 2, 3]
    first, *later = values(separate_async, f"{OFF_POLICY}/trajectory_staleness_worst/max")
    assert first == 0
    assert min(later) >= 1
    assert len(processes(separate_async, "vLLMHttpServer")) == 2


def trained_steps(result: RunResult) -> list[int]:
    return [step["step"] for step in result.steps if "actor/grad_norm" in step]


def values(result: RunResult, metric: str) -> list[float]:
    return [step[metric] for step in result.steps if metric in step]


def processes(result: RunResult, actor: str) -> set[str]:
    """The processes of a Ray actor's class that have said something."""
    return set(re.findall(rf"\({actor} pid=(\d+)\)", result.log.read_text()))
