"""verl's SFT trainer with Ray from its own command line, to the end: its driver asks the workers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")

from fp16_patch.patching.sources import installed_file
from integration.cpu import launch, process
from integration.cpu.process import RunResult
from tests.conftest import python_of_runs
from tests.e2e.verl_runs import FP16_PATCH, TIMEOUT_S, ledger
from tests.verl.sft_settings import STEPS, TOO_HIGH, settings, write_conversations

if installed_file("verl.plugin") is None:
    # What places its workers and what it makes tensors on is one setting there, which a CPU needs two values of.
    pytest.skip("this release runs it on GPUs and NPUs only", allow_module_level=True)

RANKS = 2
# The program starts Ray without arguments. What GPUs are declared are only counted.
RAY = {"RAY_ADDRESS": "local", "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 64, "GPU": RANKS})}


@pytest.fixture(scope="module")
def supervised(tiny_model: Path, warm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """`fp16-patch run`: two ranks, from a scale that is too high, where an overflow is skipped."""
    out = tmp_path_factory.mktemp("sft")
    metrics = out / "metrics.jsonl"
    overrides = settings(tiny_model, write_conversations(out), out)
    program = [str(python_of_runs(warm_python)), "-u", "-m", "verl.trainer.sft_trainer_ray"]
    plan = {"FP16_PATCH_INIT_SCALE": str(TOO_HIGH), "FP16_PATCH_ON_OVERFLOW": "skip"}
    with process.machine(out) as folder:
        own = {**launch.ENVIRONMENT, **RAY, **plan, "RAY_TMPDIR": str(folder), "VERL_FILE_LOGGER_PATH": str(metrics)}
        job = process.Job(
            command=[FP16_PATCH, "run", "--", *program, f"trainer.n_gpus_per_node={RANKS}", *overrides],
            environment=process.environment(own, str(launch.MODULES)),
            out=out,
            ready=re.compile("Total training steps"),
            read_steps=lambda: steps_in(metrics),
            steps=STEPS,
            timeout_seconds=TIMEOUT_S,
            quiet_seconds=TIMEOUT_S,
        )
        result = process.run(job)
    assert result.ok, f"{result.reason}\n{result.tail(60)}"
    return result


def steps_in(metrics: Path) -> list[dict[str, Any]]:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["data"] for line in lines if line.endswith("\n")]


def test_the_driver_asks_every_worker_again_when_they_have_computed(supervised: RunResult) -> None:
    found = ledger(supervised)
    assert sorted(each["kind"] for each in found["processes"]) == ["supervised_driver", *["worker"] * RANKS]
    assert {(each["mode"], each["problem"]) for each in found["processes"]} == {("fp16", None)}
    actor = found["roles"]["actor"]
    assert actor["autocast"] == actor["parameter"] == actor["activation"] == ["float16"]
    assert actor["gradient"] == actor["master"] == actor["log_prob"] == ["float32"]
    log = supervised.log.read_text(errors="replace")
    assert log.count(f"{RANKS + 1} processes attest mode fp16") == 1
    assert log.count("rank 0 attests mode fp16") == 1


def test_a_skipped_step_ends_no_run_and_has_no_norm(supervised: RunResult) -> None:
    assert len(supervised.steps) == STEPS
    skipped = [step["fp16/step_skipped"] for step in supervised.steps]
    assert skipped[0] == 1.0
    assert [step.get("train/grad_norm") is None for step in supervised.steps] == [skip == 1.0 for skip in skipped]
    assert supervised.steps[0]["fp16/loss_scale"] == TOO_HIGH / 2
    assert supervised.steps[0]["train/lr"] == 0.0
