"""verl's asynchronous trainers from their own command lines, stock: they take steps on samples of older weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
pytest.importorskip("vllm")

from integration.cpu.launch import RunResult
from integration.cpu.trainers import ENTRY_POINTS, Trainer
from tests.e2e.verl_runs import TIMEOUT_S

STEPS = 3
OFF_POLICY = "training/off_policy"
# In 0.9.1 a weight update waits until each request has begun, and only then stops what is sampled: it finds some
# half written where none has to queue for the sampler.
ALL_AT_ONCE = "actor_rollout_ref.rollout.max_num_seqs=64"
LONG_RESPONSES = {
    "prompts_per_step": 8,
    "responses_per_prompt": 2,
    "max_response_tokens": 256,
    "overrides": (ALL_AT_ONCE,),
}


@pytest.fixture(scope="session")
def start_async(start_verl: Callable[..., RunResult]) -> Callable[..., RunResult]:
    """Run one of verl's asynchronous trainers as it is, and see that it has ended well."""

    def started(trainer: Trainer, **settings: Any) -> RunResult:
        if not has(trainer):
            pytest.skip(f"this release of verl has no {trainer}")
        result = start_verl("bf16", trainer=trainer, **{"steps": STEPS, **LONG_RESPONSES, **settings})
        assert result.ok, f"{result.reason}\n{result.tail(60)}"
        return result

    return started


@pytest.fixture(scope="session")
def colocate_async(start_async: Callable[..., RunResult]) -> RunResult:
    """One step more: the first reward takes so long that all responses are whole by then, enough for two steps."""
    return start_async("colocate_async", steps=STEPS + 1)


@pytest.fixture(scope="session")
def separate_async(start_async: Callable[..., RunResult]) -> RunResult:
    """Two samplers apart, two batches a step."""
    return start_async("separate_async", standalone_samplers=2, updates_per_sync=2)


@pytest.fixture(scope="session")
def one_step_off(start_async: Callable[..., RunResult]) -> RunResult:
    return start_async("one_step_off")


@pytest.fixture(scope="session")
def fully_async(start_async: Callable[..., RunResult]) -> RunResult:
    """Two batches between two updates of the weights, and prompts a few at a time: there are always some to go."""
    few_at_a_time = "++async_training.concurrent_samples_per_replica=2"
    return start_async("fully_async", updates_per_sync=2, overrides=(ALL_AT_ONCE, few_at_a_time))


@pytest.fixture(scope="session")
def main_ppo_sync(start_async: Callable[..., RunResult]) -> RunResult:
    return start_async("main_ppo_sync", max_response_tokens=32, overrides=())


@pytest.mark.timeout(TIMEOUT_S)
def test_colocated_samplers_go_on_with_newer_weights_where_a_step_has_stopped_them(colocate_async: RunResult) -> None:
    assert trained_steps(colocate_async) == [1, 2, 3, 4]
    assert max(values(colocate_async, f"{OFF_POLICY}/trajectory_staleness_worst/max")) >= 1
    assert max(values(colocate_async, f"{OFF_POLICY}/trajectory_spans/max")) >= 2


@pytest.mark.timeout(TIMEOUT_S)
def test_samplers_apart_work_ahead_of_the_learner(separate_async: RunResult) -> None:
    assert trained_steps(separate_async) == [1, 2, 3]
    first, *later = values(separate_async, f"{OFF_POLICY}/trajectory_staleness_worst/max")
    assert first == 0
    assert min(later) >= 1
    assert len(processes(separate_async, "vLLMHttpServer")) == 2


@pytest.mark.timeout(TIMEOUT_S)
def test_one_step_off_samples_with_the_weights_of_the_step_before(one_step_off: RunResult) -> None:
    assert trained_steps(one_step_off) == [1, 2, 3]
    # verl has no metric of it; but here the sampler's log-probs are the old ones of the policy's update.
    first, *later = values(one_step_off, "actor/ppo_kl")
    assert min(map(abs, later)) > 5 * abs(first)


@pytest.mark.timeout(TIMEOUT_S)
def test_a_rollouter_of_its_own_goes_on_with_newer_weights(fully_async: RunResult) -> None:
    assert trained_steps(fully_async) == [1, 2, 3]
    # The version that was trained, in each step one more.
    assert values(fully_async, "fully_async/count/current_param_version") == [0, 1, 2]
    # Counted from the start on.
    assert values(fully_async, "fully_async/count/stale_trajectory_processed")[-1] >= 1
    assert max(values(fully_async, "fully_async/partial/max_partial_span")) >= 1
    assert processes(fully_async, "FullyAsyncTrainer").isdisjoint(processes(fully_async, "FullyAsyncRollouter"))


@pytest.mark.timeout(TIMEOUT_S)
def test_the_trainer_that_came_before_the_asynchronous_ones_runs_too(main_ppo_sync: RunResult) -> None:
    assert trained_steps(main_ppo_sync) == [1, 2, 3]


def has(trainer: Trainer) -> bool:
    of_v1 = trainer in ("colocate_async", "separate_async")
    return find_spec("verl.trainer.ppo.v1" if of_v1 else ENTRY_POINTS[trainer].module) is not None


def trained_steps(result: RunResult) -> list[int]:
    return [step["step"] for step in result.steps if "actor/grad_norm" in step]


def values(result: RunResult, metric: str) -> list[float]:
    return [step[metric] for step in result.steps if metric in step]


def processes(result: RunResult, actor: str) -> set[str]:
    """The processes of a Ray actor's class that have said something."""
    return set(re.findall(rf"\({actor} pid=(\d+)\)", result.log.read_text()))
