"""verl's own trainer with SGLang as its sampler, from its own command line: what a user types and what a user gets."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.sglang, pytest.mark.e2e]
pytest.importorskip("verl")
if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed here", allow_module_level=True)

from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.record.reading import load_run
from integration.cpu.launch import SGLANG_ARGUMENTS, RunResult
from tests.e2e.verl_runs import FP16_PATCH, STEPS, TIMEOUT_S, finished, ledger, mean_abs, record, served_reward_model

ARGUMENTS = "actor_rollout_ref.rollout.engine_kwargs.sglang"


@pytest.fixture(scope="session")
def one_flag(start_verl: Callable[..., RunResult], tiny_reward_model: Path) -> RunResult:
    """`external_lib=fp16_patch.verl` in an otherwise stock configuration, with a reward model that SGLang serves."""
    overrides = served_reward_model(tiny_reward_model, "sglang", SGLANG_ARGUMENTS)
    return finished(start_verl("fp16_patch", sampler="sglang", overrides=overrides))


@pytest.fixture(scope="session")
def bf16(start_verl: Callable[..., RunResult]) -> RunResult:
    """Stock, observed."""
    return finished(start_verl("bf16", sampler="sglang"))


@pytest.fixture(scope="session")
def v0(start_verl: Callable[..., RunResult]) -> RunResult:
    """`fp16-patch run` and the V0 trainer: as before verl 0.9."""
    settings = {"prefix": (FP16_PATCH, "run", "--"), "overrides": ("++trainer.use_v1=False",)}
    return finished(start_verl("fp16_patch", sampler="sglang", **settings))


@pytest.fixture(scope="session")
def kept_out(start_verl: Callable[..., RunResult]) -> RunResult:
    """The one flag, where SGLang loads another plugin and not ours."""
    return start_verl("fp16_patch", sampler="sglang", env={"SGLANG_PLUGINS": "sglang_on_cpu"})


@pytest.fixture(scope="session")
def two_ranks(start_verl: Callable[..., RunResult]) -> RunResult:
    """FSDP2 on two ranks, whose model SGLang shards over two schedulers."""
    overrides = ("actor_rollout_ref.rollout.tensor_model_parallel_size=2",)
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    settings = {"strategy": "fsdp2", "ranks": 2, "overrides": overrides, "env": environment}
    return finished(start_verl("fp16_patch", sampler="sglang", **settings))


@pytest.mark.timeout(TIMEOUT_S)
def test_one_flag_puts_learner_sampler_and_reward_model_into_float16(one_flag: RunResult) -> None:
    roles = ledger(one_flag)["roles"]
    assert set(roles) == {"actor", "rollout", "reward"}
    assert {name: roles["actor"][name] for name in ("autocast", "parameter", "activation")} == dict.fromkeys(
        ("autocast", "parameter", "activation"), ["float16"]
    )
    assert roles["rollout"] == {
        **dict.fromkeys(("engine_weight", "kv_cache", "activation", "module_output"), ["float16"]),
        # Before the schedulers have said what they keep in another dtype, and after.
        "wire": ["float16", "float32"],
        "gemm_sum": ["float32"],
    }
    # It has no head that makes log-probs.
    served = ("engine_weight", "kv_cache", "module_output")
    assert roles["reward"] == {**dict.fromkeys(served, ["float16"]), "gemm_sum": ["float32"]}


def test_every_process_attests(one_flag: RunResult) -> None:
    processes = ledger(one_flag)["processes"]
    kinds = sorted(process["kind"] for process in processes)
    assert kinds == [*["sglang_scheduler"] * 2, *["sglang_server"] * 2, "task_runner", "worker"]
    assert {(process["mode"], process["problem"]) for process in processes} == {("fp16", None)}


def test_every_sampled_token_is_observed(one_flag: RunResult, bf16: RunResult) -> None:
    for result in (one_flag, bf16):
        run = load_run(record(result))
        assert sorted(run.coverage) == list(range(1, STEPS + 1))
        assert all(coverage.complete and coverage.tokens > 500 for coverage in run.coverage.values())


@pytest.mark.timeout(TIMEOUT_S)
def test_three_more_bits_show_on_the_same_seeds(one_flag: RunResult, bf16: RunResult) -> None:
    assert mean_abs(one_flag) < 1.2e-3
    assert mean_abs(bf16) / mean_abs(one_flag) >= 7


def test_stock_computes_in_bfloat16(bf16: RunResult) -> None:
    roles = ledger(bf16)["roles"]
    assert roles["actor"]["autocast"] == ["bfloat16"]
    assert roles["rollout"]["module_output"] == roles["rollout"]["engine_weight"] == ["bfloat16"]


def test_the_runs_kind_of_gap_is_named(one_flag: RunResult) -> None:
    assert diagnose_run(load_run(record(one_flag)))[0].cause == "precision"


# That it is missed is shown on an engine, too.
@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_a_scheduler_that_was_kept_from_the_plugin_stops_the_run_before_the_first_step(kept_out: RunResult) -> None:
    assert kept_out.returncode not in (0, None)
    assert kept_out.steps == []
    log = kept_out.log.read_text()
    assert "fp16_patch.PrecisionError: training stopped" in log
    assert "no attestation: its plugin did not load" in log


@pytest.mark.timeout(TIMEOUT_S)
def test_an_argument_in_bfloat16_is_refused_before_anything_starts(start_verl: Callable[..., RunResult]) -> None:
    result = start_verl("fp16_patch", sampler="sglang", overrides=(f"+{ARGUMENTS}.dtype=bfloat16",))
    assert result.returncode not in (0, None)
    assert result.steps == []
    log = result.log.read_text()
    assert f"{ARGUMENTS}.dtype=bfloat16: it overrides the plan's float16. Fix: remove it" in log
    assert "SGLangHttpServer" not in log


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_both_ranks_and_both_schedulers_compute_in_float16(two_ranks: RunResult, bf16: RunResult) -> None:
    found = ledger(two_ranks)
    kinds = sorted(process["kind"] for process in found["processes"])
    assert kinds == [*["sglang_scheduler"] * 2, "sglang_server", "task_runner", *["worker"] * 2]
    assert found["roles"]["rollout"]["module_output"] == ["float16"]
    assert mean_abs(bf16) / mean_abs(two_ranks) >= 7


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_the_v0_trainer_samples_by_sglang_in_float16_too(v0: RunResult) -> None:
    found = ledger(v0)
    assert [process["kind"] for process in found["processes"]].count("sglang_scheduler") == 1
    assert {(process["mode"], process["problem"]) for process in found["processes"]} == {("fp16", None)}
    assert found["roles"]["rollout"]["module_output"] == found["roles"]["actor"]["autocast"] == ["float16"]
    assert all(step["mismatch/mean_abs"] < 1.2e-3 for step in v0.steps)
