"""verl's asynchronous trainers from their own command lines: planned and judged as others, and numerics told from age.

Under the plan, but for the runs that are measured beside it in bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
pytest.importorskip("vllm")

from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.record.reading import RunRecord, load_run
from integration.cpu.launch import RunResult
from integration.cpu.trainers import ENTRY_POINTS, Trainer
from tests.e2e.verl_runs import FP16_PATCH, TIMEOUT_S, ledger, record

STEPS = 3
OFF_POLICY = "training/off_policy"
# Responses so long that some are half written whenever weights change. In 0.9.1 a sync waits until each request has
# begun, and only then stops what is sampled: none may have to queue for the sampler.
ALL_AT_ONCE = "actor_rollout_ref.rollout.max_num_seqs=64"
LONG_RESPONSES: dict[str, Any] = {
    "prompts_per_step": 8,
    "responses_per_prompt": 2,
    "max_response_tokens": 256,
    "overrides": (ALL_AT_ONCE,),
}
SAMPLER = ("engine_core", "sampler_worker", "server")
# Programs that copy their configuration to several actors before any of them imports what it names.
COPYING = ("one_step_off", "fully_async")


@pytest.fixture(scope="session")
def start_async(start_verl: Callable[..., RunResult]) -> Callable[..., RunResult]:
    """Run one of verl's asynchronous trainers."""

    def started(arm: str, trainer: Trainer, **settings: Any) -> RunResult:
        if not has(trainer):
            pytest.skip(f"this release of verl has no {trainer}")
        planned = arm == "fp16_patch" and trainer in COPYING
        prefix = {"prefix": (FP16_PATCH, "run", "--")} if planned else {}
        return start_verl(arm, trainer=trainer, **{"steps": STEPS, **LONG_RESPONSES, **prefix, **settings})

    return started


@pytest.fixture(scope="session")
def separate_async(start_async: Callable[..., RunResult]) -> RunResult:
    """Two samplers apart, two updates between two syncs."""
    return finished(start_async("fp16_patch", "separate_async", standalone_samplers=2, updates_per_sync=2))


@pytest.fixture(scope="session")
def fully_async(start_async: Callable[..., RunResult]) -> RunResult:
    """A trainer and a rollouter in actors of their own, two updates between two syncs, prompts a few at a time."""
    few_at_a_time = "++async_training.concurrent_samples_per_replica=2"
    return finished(
        start_async("fp16_patch", "fully_async", updates_per_sync=2, overrides=(ALL_AT_ONCE, few_at_a_time))
    )


@pytest.fixture(scope="session")
def colocate_async(start_async: Callable[..., RunResult]) -> RunResult:
    """The first reward takes so long that all responses are whole by then, enough for two steps."""
    return finished(start_async("fp16_patch", "colocate_async", steps=STEPS + 1))


@pytest.fixture(scope="session")
def one_step_off(start_async: Callable[..., RunResult]) -> RunResult:
    return finished(start_async("fp16_patch", "one_step_off"))


@pytest.fixture(scope="session", params=["separate_async", "fully_async", "colocate_async", "one_step_off"])
def in_both(request: pytest.FixtureRequest, start_async: Callable[..., RunResult]) -> tuple[RunResult, RunResult]:
    """A mode in bfloat16, as verl has it, and under the plan."""
    stock = start_async("bf16", request.param, updates_per_sync=2)
    return finished(stock), request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def dropped_sync(
    start_async: Callable[..., RunResult], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunResult]:
    """Of two samplers, one drops what it is sent: the file with its process, and the run."""
    first = tmp_path_factory.mktemp("dropped") / "first"
    modules = {"VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,dropped_sync", "DROPPED_SYNC": str(first)}
    env = {"PYTHONPATH": str(Path(__file__).parent / "dropped_sync"), **modules}
    return first, start_async("fp16_patch", "separate_async", standalone_samplers=2, env=env)


@pytest.mark.timeout(TIMEOUT_S)
def test_samplers_apart_and_learner_compute_in_float16(separate_async: RunResult) -> None:
    found = ledger(separate_async)
    assert kinds(found) == sorted([*SAMPLER, *SAMPLER, "task_runner", "worker"])
    is_in_float16(found)
    # verl's own figure: samples were made ahead.
    _, *later = values(separate_async, f"{OFF_POLICY}/trajectory_staleness_worst/max")
    assert min(later) >= 1


def test_two_samplers_hold_the_same_weights(separate_async: RunResult) -> None:
    held = [process["held"] for process in ledger(separate_async)["processes"] if process["kind"] == "sampler_worker"]
    assert len(held) == 2
    assert held[0]["digest"]
    assert held[0] == held[1]


def test_the_lags_are_those_of_verls_own_labels(separate_async: RunResult) -> None:
    measured = [step for step in separate_async.steps if "mismatch/lag_max" in step]
    assert measured
    for step in measured:
        # verl counts a request that was stopped before its first token, too.
        assert step["mismatch/lag_max"] <= step[f"{OFF_POLICY}/trajectory_staleness_worst/max"]
        assert step["mismatch/lag_min"] == step[f"{OFF_POLICY}/trajectory_staleness/min"]
    # A response is as many parts as weights it was sampled with: whether one spans a sync is a matter of time.
    run = run_of(separate_async)
    trajectories = LONG_RESPONSES["prompts_per_step"] * LONG_RESPONSES["responses_per_prompt"]
    spanned = sum(values(separate_async, f"{OFF_POLICY}/trajectory_spans/mean")) * trajectories
    parts = sum(stats.sequences for stats in run.by_lag.values())
    assert run.stats.sequences <= parts <= round(spanned)


def test_fresh_tokens_show_numerics_alone(separate_async: RunResult) -> None:
    is_measured_by_lag(separate_async)


@pytest.mark.timeout(TIMEOUT_S)
def test_a_trainer_in_an_actor_of_its_own_is_judged_and_on_record(fully_async: RunResult) -> None:
    found = ledger(fully_async)
    assert kinds(found) == sorted([*SAMPLER, "driver", "rollouter", "task_runner_v0", "worker"])
    is_in_float16(found)
    assert values(fully_async, "fully_async/count/current_param_version") == [0, 1, 2]
    assert processes(fully_async, "FullyAsyncTrainer").isdisjoint(processes(fully_async, "FullyAsyncRollouter"))
    # A step of ours is an update: verl logs two of them as one.
    assert run_of(fully_async).recorded_steps() == list(range(1, 2 * STEPS + 1))


def test_where_nothing_scores_samples_the_update_is_observed(fully_async: RunResult) -> None:
    assert "rollout_correction.bypass_mode takes the sampler's log-probs" in fully_async.log.read_text()
    is_measured_by_lag(fully_async)


def test_a_run_s_report_says_what_is_drift(fully_async: RunResult) -> None:
    causes = [finding.cause for finding in diagnose_run(run_of(fully_async))]
    assert causes[:1] == ["drift"]
    assert "stale_weights" not in causes


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_three_more_bits_show_at_lag_0(in_both: tuple[RunResult, RunResult]) -> None:
    stock, ours = (run_of(result).by_lag[0].metrics(prefix="")["mean_abs"] for result in in_both)
    assert stock / ours > 7


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_colocated_samplers_go_on_with_newer_weights_where_a_step_has_stopped_them(colocate_async: RunResult) -> None:
    is_in_float16(ledger(colocate_async))
    assert max(values(colocate_async, f"{OFF_POLICY}/trajectory_spans/max")) >= 2
    is_measured_by_lag(colocate_async)


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_one_step_off_samples_with_the_weights_of_the_step_before(one_step_off: RunResult) -> None:
    is_in_float16(ledger(one_step_off))
    # Its first two syncs send the same weights under two labels.
    assert run_of(one_step_off).mismatch.series("mismatch/lag_mean") == {1: 0, 2: 1, 3: 1}
    is_measured_by_lag(one_step_off)


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_a_sampler_that_drops_a_sync_is_named(dropped_sync: tuple[Path, RunResult]) -> None:
    first, result = dropped_sync
    assert result.returncode not in (0, None)
    log = result.log.read_text()
    (dropping,) = {
        int(pid) for pid in re.findall(r"(\d+) +rollout +weights +other weights than the other sampler", log)
    }
    assert dropping == int(first.read_text())


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_a_trainer_that_ray_sends_by_value_trains_as_it_is(start_async: Callable[..., RunResult]) -> None:
    finished(start_async("bf16", "main_ppo_sync", max_response_tokens=32, overrides=()))


def is_in_float16(found: dict[str, Any]) -> None:
    assert {(process["mode"], process["problem"]) for process in found["processes"]} == {("fp16", None)}
    roles = found["roles"]
    assert set(roles) == {"actor", "rollout"}
    for name in ("autocast", "parameter", "activation"):
        assert roles["actor"][name] == ["float16"]
    for name in ("engine_weight", "kv_cache", "activation"):
        assert roles["rollout"][name] == ["float16"]


def is_measured_by_lag(result: RunResult) -> None:
    by_lag = run_of(result).by_lag
    assert set(by_lag) >= {0, 1}
    mean_abs = {lag: stats.metrics(prefix="")["mean_abs"] for lag, stats in by_lag.items()}
    assert mean_abs[0] < 1.2e-3
    assert mean_abs[1] > 10 * mean_abs[0]  # at this learning rate
    known = [step["mismatch/lag_known"] for step in result.steps if "mismatch/lag_known" in step]
    assert known
    assert set(known) == {1.0}


def finished(result: RunResult) -> RunResult:
    assert result.ok, f"{result.reason}\n{result.tail(60)}"
    assert trained_steps(result)[:STEPS] == list(range(1, STEPS + 1))
    return result


def has(trainer: Trainer) -> bool:
    of_v1 = trainer in ("colocate_async", "separate_async")
    return find_spec("verl.trainer.ppo.v1" if of_v1 else ENTRY_POINTS[trainer].module) is not None


def run_of(result: RunResult) -> RunRecord:
    return load_run(record(result))


def kinds(found: dict[str, Any]) -> list[str]:
    return sorted(process["kind"] for process in found["processes"])


def trained_steps(result: RunResult) -> list[int]:
    return [step["step"] for step in result.steps if "actor/grad_norm" in step]


def values(result: RunResult, metric: str) -> list[float]:
    return [step[metric] for step in result.steps if metric in step]


def processes(result: RunResult, actor: str) -> set[str]:
    """The processes of a Ray actor's class that have said something."""
    return set(re.findall(rf"\({actor} pid=(\d+)\)", result.log.read_text()))
