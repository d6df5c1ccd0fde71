"""verl with Megatron as its learner, from its own command line: what a user types and what a user gets."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.megatron, pytest.mark.vllm, pytest.mark.e2e]
pytest.importorskip("verl")
if find_spec("megatron") is None:
    pytest.skip("Megatron-Core is not installed here", allow_module_level=True)

from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.record.reading import load_run
from integration.cpu.launch import RunResult
from tests.e2e.verl_runs import STEPS, TIMEOUT_S, finished, ledger, mean_abs, record


@pytest.fixture(scope="session")
def one_flag(start_verl: Callable[..., RunResult]) -> RunResult:
    """`external_lib=fp16_patch.verl` in an otherwise stock configuration."""
    return finished(start_verl("fp16_patch", strategy="megatron"))


@pytest.fixture(scope="session")
def bf16(start_verl: Callable[..., RunResult]) -> RunResult:
    """Stock, observed."""
    return finished(start_verl("bf16", strategy="megatron"))


@pytest.fixture(scope="session")
def two_ranks(start_verl: Callable[..., RunResult]) -> RunResult:
    """Two ranks share each layer, with a reference and the older bridge, at a first scale that overflows."""
    mbridge = [f"actor_rollout_ref.{role}.megatron.vanilla_mbridge=True" for role in ("actor", "ref")]
    overrides = (f"+fp16_patch.init_scale={2**24}", *mbridge)
    return finished(
        start_verl("fp16_patch", strategy="megatron", ranks=2, tensor_parallel=2, use_ref=True, overrides=overrides)
    )


@pytest.mark.timeout(TIMEOUT_S)
def test_one_flag_puts_megatron_and_its_sampler_into_float16(one_flag: RunResult) -> None:
    roles = ledger(one_flag)["roles"]
    assert set(roles) == {"actor", "rollout"}
    computed = ("parameter", "activation")
    assert {name: roles["actor"][name] for name in computed} == dict.fromkeys(computed, ["float16"])
    assert roles["actor"]["gradient"] == roles["actor"]["master"] == roles["actor"]["log_prob"] == ["float32"]
    held = ("engine_weight", "kv_cache", "activation")
    assert {name: roles["rollout"][name] for name in held} == dict.fromkeys(held, ["float16"])


def test_every_process_attests(one_flag: RunResult) -> None:
    processes = ledger(one_flag)["processes"]
    kinds = sorted(process["kind"] for process in processes)
    assert kinds == ["engine_core", "sampler_worker", "server", "task_runner", "worker"]
    assert {(process["mode"], process["problem"]) for process in processes} == {("fp16", None)}


@pytest.mark.timeout(TIMEOUT_S)
def test_every_sampled_token_is_observed(one_flag: RunResult, bf16: RunResult) -> None:
    for result in (one_flag, bf16):
        run = load_run(record(result))
        assert sorted(run.coverage) == list(range(1, STEPS + 1))
        assert all(coverage.complete and coverage.tokens > 500 for coverage in run.coverage.values())


def test_three_more_bits_show_on_the_same_seeds(one_flag: RunResult, bf16: RunResult) -> None:
    assert mean_abs(one_flag) < 1.2e-3
    assert mean_abs(bf16) / mean_abs(one_flag) >= 7


def test_the_step_and_its_scale_are_in_verls_metrics(one_flag: RunResult) -> None:
    for step in one_flag.steps:
        assert step["fp16/skipped_total"] == 0.0
        assert step["fp16/loss_scale"] >= 1.0
        assert step["mismatch/prob_mean_abs"] == pytest.approx(step["training/rollout_probs_diff_mean"], rel=1e-3)


def test_stock_computes_in_bfloat16(bf16: RunResult) -> None:
    roles = ledger(bf16)["roles"]
    assert roles["actor"]["parameter"] == roles["rollout"]["engine_weight"] == ["bfloat16"]


def test_the_runs_kind_of_gap_is_named(one_flag: RunResult) -> None:
    assert diagnose_run(load_run(record(one_flag)))[0].cause == "precision"


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_both_ranks_compute_in_float16_and_try_an_overflow_again(two_ranks: RunResult, bf16: RunResult) -> None:
    found = ledger(two_ranks)
    assert {role: found["roles"][role]["parameter"] for role in ("actor", "ref")} == {
        "actor": ["float16"],
        "ref": ["float16"],
    }
    assert [process["kind"] for process in found["processes"]].count("worker") == 2
    assert [step["fp16/skipped_total"] for step in two_ranks.steps] == [0.0] * STEPS
    assert two_ranks.steps[0]["fp16/retries"] > 0
    assert mean_abs(bf16) / mean_abs(two_ranks) >= 7
