"""verl's V0 trainer from its own command line, to the end: the only one that releases before 0.9.0 have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
pytest.importorskip("vllm")

from fp16_patch.mismatch.record.reading import load_run
from fp16_patch.patching.declarations import Status
from integration.cpu.launch import RunResult
from tests.e2e.verl_runs import FP16_PATCH, finished, ledger, record
from tests.installed_release import verdict_on


@pytest.fixture(scope="session")
def v0(start_verl: Callable[..., RunResult]) -> RunResult:
    """`fp16-patch run`: two ranks, a critic and a reference."""
    return finished(
        start_verl(
            "fp16_patch",
            prefix=(FP16_PATCH, "run", "--"),
            ranks=2,
            adv_estimator="gae",
            use_ref=True,
            overrides=("++trainer.use_v1=False", "algorithm.gamma=1.0"),
        )
    )


def test_the_v0_trainer_judges_every_process_too(v0: RunResult) -> None:
    found = ledger(v0)
    # The launching process, which computes nothing, attests where the release has it look at the configuration.
    kinds = sorted(process["kind"] for process in found["processes"] if process["kind"] != "driver")
    assert kinds == sorted([*["engine_core", "sampler_worker", "server", "worker"] * 2, "task_runner_v0"])
    assert {(process["mode"], process["problem"]) for process in found["processes"]} == {("fp16", None)}
    assert set(found["roles"]) == {"actor", "critic", "ref", "rollout"}
    for role in ("actor", "critic", "ref"):
        assert found["roles"][role]["autocast"] == found["roles"][role]["activation"] == ["float16"]
    for role in ("actor", "critic"):
        assert found["roles"][role]["gradient"] == found["roles"][role]["master"] == ["float32"]
    rollout = found["roles"]["rollout"]
    by_engine = verdict_on("fsdp-wire-dtype").status is Status.APPLIES
    wire = ["float16", "float32"] if by_engine else ["float32"]
    assert (rollout["engine_weight"], rollout["wire"]) == (["float16"], wire)


def test_the_v0_trainers_steps_are_measured_and_logged_too(v0: RunResult) -> None:
    run = load_run(record(v0))
    for step in v0.steps:
        for prefix in ("fp16/", "fp16/critic/"):
            assert step[f"{prefix}loss_scale"] == v0.steps[0][f"{prefix}loss_scale"] <= 65536.0
            assert step[f"{prefix}skipped_total"] == 0.0
        assert step["mismatch/mean_abs"] < 1.2e-3
        assert step["mismatch/prob_mean_abs"] == pytest.approx(step["training/rollout_probs_diff_mean"], rel=1e-3)
        coverage = run.coverage[step["step"]]
        assert coverage.complete
        assert (coverage.ranks, coverage.expected_ranks) == (2, 2)
        assert coverage.tokens == coverage.expected_tokens == step["mismatch/tokens"] > 500
