"""verl's own trainer from its own command line, to the end: what a user types and what a user gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
pytest.importorskip("vllm")

from fp16_patch.cli import main
from fp16_patch.mismatch.diagnosis.findings import diagnose_run
from fp16_patch.mismatch.record.reading import load_run
from integration.cpu.launch import RunResult
from tests.e2e.verl_runs import (
    FP16_PATCH,
    STEPS,
    TIMEOUT_S,
    finished,
    ledger,
    record,
    served_reward_model,
    served_teacher,
)

# Far above what FP16 gradients bear, and a power of two.
OVERFLOWING = 2**40


@pytest.fixture(scope="session")
def one_flag(start_verl: Callable[..., RunResult], tiny_reward_model: Path) -> RunResult:
    """`external_lib=fp16_patch.verl` in an otherwise stock configuration, with reference and reward model, saved."""
    overrides = (f"trainer.save_freq={STEPS}", *served_reward_model(tiny_reward_model, "vllm"))
    return finished(start_verl("fp16_patch", use_ref=True, overrides=overrides))


@pytest.fixture(scope="session")
def stock_fp16(start_verl: Callable[..., RunResult]) -> RunResult:
    """verl's documented float16 keys, observed."""
    return finished(start_verl("stock-fp16"))


@pytest.fixture(scope="session")
def calibrating(start_verl: Callable[..., RunResult]) -> RunResult:
    """`fp16-patch run`, FSDP2 on two ranks with a critic, at a loss scale that overflows, beside a foreign cluster."""
    return finished(
        start_verl(
            "fp16_patch",
            prefix=(FP16_PATCH, "run", "--"),
            strategy="fsdp2",
            ranks=2,
            adv_estimator="gae",
            env={"RAY_ADDRESS": "127.0.0.1:1"},
            overrides=(
                f"+fp16_patch.init_scale={OVERFLOWING}",
                "+fp16_patch.on_overflow=skip",
                "algorithm.gamma=1.0",
            ),
        )
    )


@pytest.fixture(scope="session")
def distilled(start_verl: Callable[..., RunResult], tiny_model: Path) -> RunResult:
    """The one flag, with a teacher that vLLM serves."""
    return finished(start_verl("fp16_patch", overrides=served_teacher(tiny_model, "vllm")))


@pytest.fixture(scope="session")
def broken_sampler(start_verl: Callable[..., RunResult]) -> RunResult:
    """The one flag, where our plugin cannot be imported in vLLM's worker process."""
    return start_verl("fp16_patch", env={"PYTHONPATH": str(Path(__file__).parent / "broken_sampler")})


@pytest.fixture(scope="session")
def mixed_pair(start_verl: Callable[..., RunResult]) -> RunResult:
    """The one flag, in a fork that starts its sampler in bfloat16 all the same."""
    modules = {"VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,mixed_sampler"}
    return start_verl("fp16_patch", env={"PYTHONPATH": str(Path(__file__).parent / "mixed_sampler"), **modules})


@pytest.mark.timeout(TIMEOUT_S)
def test_one_flag_puts_every_role_into_float16(one_flag: RunResult) -> None:
    roles = ledger(one_flag)["roles"]
    assert set(roles) == {"actor", "ref", "rollout", "reward"}
    for role in ("actor", "ref"):
        assert {name: roles[role][name] for name in ("autocast", "parameter", "activation")} == dict.fromkeys(
            ("autocast", "parameter", "activation"), ["float16"]
        )
        assert roles[role]["log_prob"] == ["float32"]
    assert roles["actor"]["gradient"] == roles["actor"]["master"] == ["float32"]
    rollout = {name: roles["rollout"][name] for name in ("engine_weight", "kv_cache", "activation", "wire")}
    assert rollout == {
        "engine_weight": ["float16"],
        "kv_cache": ["float16"],
        "activation": ["float16"],
        # Before the samplers have said what they keep in another dtype, and after.
        "wire": ["float16", "float32"],
    }
    assert one_flag.log.read_text().count("weights are sent to the sampler in float16\n") == 1
    # vLLM keeps the head that makes the score in float32.
    reward = {"engine_weight": ["float16", "float32"], "kv_cache": ["float16"]}
    assert roles["reward"] == {**reward, "gemm_sum": ["float32"]}
    assert {role: row["gemm_sum"] for role, row in roles.items()} == dict.fromkeys(roles, ["float32"])


def test_every_process_attests(one_flag: RunResult) -> None:
    processes = ledger(one_flag)["processes"]
    kinds = sorted(process["kind"] for process in processes)
    sampler = ["engine_core", "sampler_worker", "server"]
    assert kinds == sorted([*sampler, *sampler, "task_runner", "worker"])
    assert len({process["pid"] for process in processes}) == 8
    assert {(process["mode"], process["problem"]) for process in processes} == {("fp16", None)}


def test_what_the_configuration_said_otherwise_is_named_once(one_flag: RunResult) -> None:
    log = one_flag.log.read_text()
    assert log.count("every role computes in float16; the configuration said otherwise") == 1
    assert log.count("actor_rollout_ref.rollout.dtype: bfloat16 → float16") == 1
    assert log.count("reward.reward_model.rollout.dtype: bfloat16 → float16") == 1


def test_the_first_scale_is_measured_and_said_once(one_flag: RunResult) -> None:
    assert one_flag.log.read_text().count("actor: the first mini-batch's largest gradient is") == 1


def test_mismatch_and_step_outcome_are_in_verls_metrics(one_flag: RunResult) -> None:
    for step in one_flag.steps:
        assert step["fp16/loss_scale"] == one_flag.steps[0]["fp16/loss_scale"] <= 65536.0
        assert step["fp16/step_skipped"] == step["fp16/skipped_total"] == step["fp16/consecutive_skips"] == 0.0
        assert step["mismatch/tokens"] > 500
        assert step["mismatch/nonfinite_tokens"] == 0
        # verl's own figure of the same tokens
        assert step["mismatch/prob_mean_abs"] == pytest.approx(step["training/rollout_probs_diff_mean"], rel=1e-3)
        assert step["mismatch/k1"] == pytest.approx(step["rollout_corr/kl"], rel=1e-4, abs=1e-8)
        # another framework's name, which verl does not report itself
        assert step["sampling/sampling_logp_difference/mean"] == step["mismatch/mean_abs"]


def test_every_sampled_token_is_observed_on_the_rank_that_scored_it(
    one_flag: RunResult, calibrating: RunResult
) -> None:
    for result, ranks in ((one_flag, 1), (calibrating, 2)):
        run = load_run(record(result))
        assert sorted(run.coverage) == list(range(1, STEPS + 1))
        for coverage in run.coverage.values():
            assert coverage.complete
            assert (coverage.ranks, coverage.expected_ranks, coverage.dropped) == (ranks, ranks, 0)
            assert coverage.tokens == coverage.expected_tokens > 500


def test_the_learner_is_compared_with_itself_at_the_first_step(one_flag: RunResult) -> None:
    floors = [step.get("mismatch/noise_floor_tokens") for step in one_flag.steps]
    assert floors[0] > 0
    assert floors[1:] == [None] * (STEPS - 1)
    # One response is scored again, and may be of two tokens: too few for its mean to be told from the others'.
    assert one_flag.steps[0]["mismatch/noise_floor_max_abs"] < one_flag.steps[0]["mismatch/max_abs"]


def test_the_runs_kind_of_gap_is_named(one_flag: RunResult) -> None:
    assert diagnose_run(load_run(record(one_flag)))[0].cause == "precision"


def test_three_more_bits_show_on_the_same_keys_and_seeds(one_flag: RunResult, stock_fp16: RunResult) -> None:
    stock, ours = (load_run(record(result)).summary()["mismatch"]["mean_abs"] for result in (stock_fp16, one_flag))
    assert ours < 1.2e-3
    assert stock / ours > 6


def test_stock_learner_stays_in_bfloat16_under_the_documented_keys(stock_fp16: RunResult) -> None:
    roles = ledger(stock_fp16)["roles"]
    assert roles["actor"]["autocast"] == ["bfloat16"]
    assert roles["rollout"]["engine_weight"] == ["float16"]


def test_the_checkpoint_holds_the_loss_scale(one_flag: RunResult) -> None:
    (state,) = one_flag.log.parent.rglob("fp16_patch_scaler_world_size_1_rank_0.json")
    saved = json.loads(state.read_text())
    assert saved["scaler"] == {"scale": one_flag.steps[-1]["fp16/loss_scale"], "_growth_tracker": STEPS}
    assert saved["history"]["attempted"] == STEPS


def test_the_report_command_reads_the_run(one_flag: RunResult, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(main, ["report", str(record(one_flag).parent), "--html", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "float16" in shown.output
    assert "<svg" in page.read_text()


def test_skips_are_counted_the_schedule_holds_and_no_norm_is_averaged(calibrating: RunResult) -> None:
    for count, step in enumerate(calibrating.steps, start=1):
        for prefix in ("fp16/", "fp16/critic/"):
            assert step[f"{prefix}loss_scale"] == OVERFLOWING / 2**count
            assert step[f"{prefix}step_skipped"] == 1.0
            assert step[f"{prefix}skipped_total"] == step[f"{prefix}consecutive_skips"] == count
        assert "actor/grad_norm" not in step
        assert "critic/grad_norm" not in step
    assert len({step["actor/lr"] for step in calibrating.steps}) == 1


def test_calibration_is_announced_once_for_each_engine(calibrating: RunResult) -> None:
    log = calibrating.log.read_text()
    assert log.count("actor: gradients overflowed at loss scale 1.09951e+12") == 1
    assert log.count("critic: gradients overflowed at loss scale 1.09951e+12") == 1


def test_run_reaches_driver_critic_and_both_ranks(calibrating: RunResult) -> None:
    found = ledger(calibrating)
    kinds = sorted(process["kind"] for process in found["processes"])
    assert kinds == [
        "driver",
        *["engine_core"] * 2,
        *["sampler_worker"] * 2,
        *["server"] * 2,
        "task_runner",
        *["worker"] * 2,
    ]
    assert sorted(process["rank"] for process in found["processes"] if process["kind"] == "worker") == [0, 1]
    assert found["roles"]["critic"]["autocast"] == ["float16"]


def test_a_plugin_that_fails_in_one_process_stops_the_run_before_the_first_step(broken_sampler: RunResult) -> None:
    assert broken_sampler.returncode not in (0, None)
    assert broken_sampler.steps == []
    log = broken_sampler.log.read_text()
    # vLLM's loader goes on after a plugin that cannot be imported; ours is one that fails when it is called.
    why = "fp16_patch cannot start in a process of vLLM (ImportError: this file is missing on this machine)"
    assert why in log


@pytest.mark.timeout(TIMEOUT_S)
def test_a_mixed_pair_is_refused_before_the_first_step(mixed_pair: RunResult) -> None:
    assert mixed_pair.returncode not in (0, None)
    assert mixed_pair.steps == []
    log = mixed_pair.log.read_text()
    assert "fp16_patch.PrecisionError: training stopped" in log
    named = [line for line in log.splitlines() if "engine_weight" in line and "bfloat16" in line]
    assert named
    assert all("rollout" in line for line in named)


@pytest.mark.matrix
@pytest.mark.timeout(TIMEOUT_S)
def test_a_teacher_computes_in_float16(distilled: RunResult) -> None:
    found = ledger(distilled)
    assert set(found["roles"]) == {"actor", "rollout", "teacher"}
    teacher = found["roles"]["teacher"]
    assert teacher["engine_weight"] == teacher["kv_cache"] == teacher["activation"] == ["float16"]
    kinds = [process["kind"] for process in found["processes"]]
    assert kinds.count("sampler_worker") == 2
