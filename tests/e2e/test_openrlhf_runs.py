"""OpenRLHF's own trainer from its own command line, to the end: what a user types and what a user gets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.openrlhf, pytest.mark.e2e]
pytest.importorskip("openrlhf")
pytest.importorskip("vllm")

from fp16_patch.mismatch.record.reading import load_run
from integration.cpu.arms_openrlhf import OBSERVED, RUN
from integration.cpu.launch_openrlhf import OpenRLHFConfig, RunResult, run
from integration.cpu.warm.servers import IMPORTS, WarmServers
from integration.demo import digit_share, run_openrlhf, task
from tests.conftest import openrlhf_environment, python_of_runs
from tests.integration.lending import lend_run
from tests.integration.smokes import smoke

TIMEOUT_S = 900
STEPS = 2
# Far above what FP16 gradients bear, and a power of two.
OVERFLOWING = 2**40
PATCHED = (*RUN, "--")
# Sampling takes longer than an update, so that responses are half written where weights change.
ASYNCHRONOUS: dict[str, Any] = {
    "steps": 5,
    "prompts_per_step": 4,
    "responses_per_prompt": 2,
    "max_response_tokens": 192,
    "extra": ("--train.async_enable", "--train.async_queue_size", "2", "--train.partial_rollout_enable"),
}


@pytest.fixture(scope="session")
def start(
    tiny_model: Path, warm_servers: WarmServers, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunResult]:
    """Run OpenRLHF as `fp16-patch run` or a script starts it."""
    python = python_of_runs(warm_servers.server(IMPORTS, openrlhf_environment()).interpreter)
    folder = tmp_path_factory.mktemp("openrlhf_task")
    prompts, reward = task.write_prompts(folder), Path(digit_share.__file__)

    def started(name: str, prefix: tuple[str, ...], **settings: Any) -> RunResult:
        out = tmp_path_factory.mktemp(name)
        limits = {"steps": STEPS, "timeout_seconds": TIMEOUT_S, "python": python}
        return run(OpenRLHFConfig(tiny_model, prompts, reward, out, prefix=prefix, **{**limits, **settings}))

    return started


@pytest.fixture(scope="session")
def patched(start: Callable[..., RunResult]) -> RunResult:
    """`fp16-patch run` and nothing else; a moving average of the weights, a checkpoint, no correction."""
    save = ("--ckpt.save_steps", str(STEPS), "--ckpt.save_hf")
    return finished(start("patched", PATCHED, ema=True, correction=False, extra=save))


@pytest.fixture(scope="session")
def bf16(start: Callable[..., RunResult]) -> RunResult:
    """OpenRLHF as it is, observed."""
    return finished(start("bf16", OBSERVED))


@pytest.fixture(scope="session")
def stock_fp16(start: Callable[..., RunResult]) -> RunResult:
    """OpenRLHF's own fp16 switch, observed."""
    return start("stock_fp16", OBSERVED, extra=("--ds.param_dtype", "fp16"))


@pytest.fixture(scope="session")
def calibrating(start: Callable[..., RunResult]) -> RunResult:
    """All roles, ZeRO 3 on two ranks, a loss scale that overflows, the address of a foreign cluster."""
    return finished(
        start(
            "calibrating",
            PATCHED,
            estimator="gae",
            use_ref=True,
            use_reward_model=True,
            zero_stage=3,
            ranks=2,
            env={
                "RAY_ADDRESS": "127.0.0.1:1",
                "FP16_PATCH_INIT_SCALE": str(OVERFLOWING),
                "FP16_PATCH_ON_OVERFLOW": "skip",
            },
        )
    )


@pytest.fixture(scope="session")
def lora(start: Callable[..., RunResult]) -> RunResult:
    """Adapters on every linear layer; stock OpenRLHF ends at the first weight sync, in any dtype."""
    return finished(start("lora", PATCHED, lora_rank=8))


@pytest.fixture(scope="session")
def asynchronous(start: Callable[..., RunResult]) -> RunResult:
    """Samples up to two updates old, and responses that a broadcast of weights pauses half written."""
    return finished(start("asynchronous", PATCHED, **ASYNCHRONOUS), ASYNCHRONOUS["steps"])


@pytest.fixture(scope="session")
def asynchronous_bf16(start: Callable[..., RunResult]) -> RunResult:
    """The same, OpenRLHF as it is."""
    return finished(start("asynchronous_bf16", OBSERVED, **ASYNCHRONOUS), ASYNCHRONOUS["steps"])


@pytest.fixture(scope="session")
def mixed_pair(start: Callable[..., RunResult]) -> RunResult:
    """The plan, in a fork of OpenRLHF whose sampler stays in bfloat16."""
    return start("mixed_pair", (sys.executable, str(Path(__file__).with_name("mixed_pair.py"))))


def finished(result: RunResult, steps: int = STEPS) -> RunResult:
    assert result.ok, f"{result.reason}\n{result.tail(60)}"
    assert len(result.steps) == steps
    return result


def record(result: RunResult) -> Path:
    return result.log.parent / "checkpoints" / "fp16_patch"


def ledger(result: RunResult) -> dict[str, Any]:
    return dict(json.loads((record(result) / "ledger.json").read_text()))


@pytest.mark.timeout(TIMEOUT_S)
def test_stock_fp16_ends_at_the_first_weight_sync(stock_fp16: RunResult) -> None:
    assert stock_fp16.returncode not in (0, None)
    assert stock_fp16.steps == []
    assert "mismatch dtype: src torch.float16, dst torch.bfloat16" in stock_fp16.log.read_text()


def test_every_role_and_the_engine_are_in_float16(patched: RunResult) -> None:
    roles = ledger(patched)["roles"]
    assert set(roles) == {"actor", "ema", "rollout"}
    assert roles["ema"]["parameter"] == ["float16"]
    assert {name: roles["actor"][name] for name in ("parameter", "activation")} == {
        "parameter": ["float16"],
        "activation": ["float16"],
    }
    in_float32 = ("log_prob", "gradient", "master", "rope")
    assert {name: roles["actor"][name] for name in in_float32} == dict.fromkeys(in_float32, ["float32"])
    sampler = ("engine_weight", "kv_cache", "activation", "wire")
    assert roles["rollout"] == {**dict.fromkeys(sampler, ["float16"]), "gemm_sum": ["float32"]}


def test_every_process_attests(patched: RunResult) -> None:
    processes = ledger(patched)["processes"]
    kinds = sorted(process["kind"] for process in processes)
    assert kinds == ["driver", "engine_core", "sampler_worker", "server", "task_runner", "worker"]
    assert len({process["pid"] for process in processes}) == 6
    assert {(process["mode"], process["problem"]) for process in processes} == {("fp16", None)}


def test_what_the_command_line_said_otherwise_is_named_once(patched: RunResult) -> None:
    log = patched.log.read_text()
    assert log.count("every role computes in float16; the command line said otherwise") == 1
    assert log.count("--ds.param_dtype: bf16 → fp16") == 1


def test_mismatch_and_step_outcome_are_in_the_status_without_correction(patched: RunResult) -> None:
    for step in patched.steps:
        assert step["fp16/loss_scale"] == 65536.0
        assert step["fp16/step_skipped"] == step["fp16/skipped_total"] == step["fp16/consecutive_skips"] == 0.0
        assert step["mismatch/tokens"] > 500
        assert step["mismatch/nonfinite_tokens"] == 0
        assert "vllm_kl" not in step
        assert step["mismatch/coverage"] == 1


def test_our_signed_mean_is_openrlhfs(bf16: RunResult) -> None:
    for step in bf16.steps:
        # vllm_kl is the mean of sampler minus learner, over the same tokens.
        assert step["mismatch/k1"] == pytest.approx(step["vllm_kl"], abs=2e-5)
        # Over 950 tokens, the standard error of the signed mean is about 0.04 of the mean absolute difference.
        assert step["mismatch/mean_abs"] > 5 * abs(step["vllm_kl"])


def test_three_more_bits_show(patched: RunResult, bf16: RunResult) -> None:
    stock, ours = (load_run(record(result)).summary()["mismatch"]["mean_abs"] for result in (bf16, patched))
    assert ours < 1.2e-3
    assert stock / ours > 6


def test_saved_weights_are_float16_and_say_so(patched: RunResult) -> None:
    from tests.verl.folder import folder_facts

    folder = patched.log.parent / "model"
    assert folder_facts(folder) == {"label": "float16", "held": ["float16"]}


def test_skips_are_counted_for_both_engines_and_the_schedule_holds(calibrating: RunResult) -> None:
    for count, step in enumerate(calibrating.steps, start=1):
        for prefix in ("fp16/", "fp16/critic/"):
            assert step[f"{prefix}loss_scale"] == OVERFLOWING / 2**count
            assert step[f"{prefix}step_skipped"] == 1.0
            assert step[f"{prefix}skipped_total"] == step[f"{prefix}consecutive_skips"] == count
        assert "actor_grad_norm" not in step
        assert "critic_grad_norm" not in step
    assert len({step["actor_lr"] for step in calibrating.steps}) == 1


def test_every_token_trained_on_is_observed_on_its_rank(calibrating: RunResult) -> None:
    run = load_run(record(calibrating))
    assert sorted(run.coverage) == [step["step"] for step in calibrating.steps]
    for coverage in run.coverage.values():
        assert (coverage.ranks, coverage.expected_ranks, coverage.complete) == (2, 2, True)
        assert coverage.tokens == coverage.expected_tokens > 500


def test_calibration_is_announced_once_for_each_engine(calibrating: RunResult) -> None:
    log = calibrating.log.read_text()
    for role in ("actor", "critic"):
        assert log.count(f"{role}: gradients overflowed at loss scale 1.09951e+12") == 1


def test_all_roles_on_both_ranks_attest(calibrating: RunResult) -> None:
    found = ledger(calibrating)
    workers = sorted(process["rank"] for process in found["processes"] if process["kind"] == "worker")
    # Actor and critic on two ranks each, reference and reward model on one.
    assert workers == [0, 0, 0, 0, 1, 1]
    assert set(found["roles"]) == {"actor", "critic", "ref", "reward", "rollout"}
    for role in ("actor", "critic", "ref", "reward"):
        assert found["roles"][role]["parameter"] == found["roles"][role]["activation"] == ["float16"]


def test_a_lora_policy_reaches_the_sampler(lora: RunResult) -> None:
    assert ledger(lora)["roles"]["rollout"]["wire"] == ["float16"]
    # The second step samples with the weights that the first one sent.
    assert lora.steps[1]["mismatch/mean_abs"] < 1.5e-3


@pytest.mark.timeout(TIMEOUT_S)
def test_an_asynchronous_run_is_in_float16_throughout(asynchronous: RunResult) -> None:
    found = ledger(asynchronous)
    kinds = sorted(process["kind"] for process in found["processes"])
    assert kinds == ["driver", "engine_core", "sampler_worker", "server", "task_runner", "worker"]
    assert {(process["mode"], process["problem"]) for process in found["processes"]} == {("fp16", None)}
    halves = {"actor": ("parameter", "activation"), "rollout": ("engine_weight", "kv_cache", "activation", "wire")}
    for role, quantities in halves.items():
        assert {name: found["roles"][role][name] for name in quantities} == dict.fromkeys(quantities, ["float16"])


@pytest.mark.timeout(TIMEOUT_S)
def test_fresh_tokens_are_told_from_those_of_older_weights(asynchronous: RunResult) -> None:
    first, *later = asynchronous.steps
    assert first["mismatch/lag_max"] == 0
    assert max(step["mismatch/lag_max"] for step in later) >= 1
    for step in asynchronous.steps:
        assert step["mismatch/lag_known"] == step["mismatch/coverage"] == 1
        assert step.get("mismatch/lag0_mean_abs", 0) < 1.5e-3
        assert step.get("mismatch/stale_mean_abs", 1) > 3 * first["mismatch/lag0_mean_abs"]
        # One token on the wrong side of a broadcast would be off by as much as the stale ones.
        assert step.get("mismatch/lag0_max_abs", 0) < 3e-2
    # Tokens of one batch, some before and some after the broadcast that paused it.
    assert any(step["mismatch/lag_min"] < step["mismatch/lag_max"] for step in later)
    by_lag = load_run(record(asynchronous)).by_lag
    assert by_lag[0].metrics()["mismatch/mean_abs"] < 1.5e-3 < by_lag[1].metrics()["mismatch/mean_abs"]


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_three_more_bits_show_in_fresh_tokens(asynchronous: RunResult, asynchronous_bf16: RunResult) -> None:
    stock, ours = (
        load_run(record(result)).by_lag[0].metrics()["mismatch/mean_abs"]
        for result in (asynchronous_bf16, asynchronous)
    )
    assert stock / ours > 6


def test_a_mixed_pair_is_refused_before_the_first_step(mixed_pair: RunResult) -> None:
    assert mixed_pair.returncode not in (0, None)
    assert mixed_pair.steps == []
    log = mixed_pair.log.read_text()
    assert "fp16_patch.PrecisionError: training stopped" in log
    named = [line for line in log.splitlines() if "engine_weight" in line and "bfloat16" in line]
    assert named
    assert all("rollout" in line for line in named)


def test_the_demo_runs_in_its_smallest_form(
    patched: RunResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_openrlhf, "run", lambda config, on_step: lend_run(patched, config, on_step))
    assert "nothing is kept" in smoke("integration.demo.run_openrlhf", capsys)
