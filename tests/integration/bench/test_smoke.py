"""Every bench starts, in its smallest form; and the run that they share is what its plants make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("pandas")
pytest.importorskip("ray")
pytest.importorskip("verl")
pytest.importorskip("vllm")

from fp16_patch.mismatch.record.reading import load_run
from integration import bench
from integration.bench import ablation
from integration.cpu.arms import record_of
from integration.cpu.launch import RunResult
from tests.integration.conftest import PLANTED, STEPS
from tests.integration.smokes import runnable

TIMEOUT_S = 900
# What draws from the figures that are kept, and measures nothing: tests draw all of it.
DRAWN = {"page": "test_page.py", "write": "test_write.py"}
BENCHES = [name for name in runnable(bench) if name not in DRAWN]


@pytest.mark.verl
@pytest.mark.vllm
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("name", BENCHES)
def test_it_runs_in_its_smallest_form(name: str, start_smoke: Callable[[str], str]) -> None:
    said = start_smoke(f"integration.bench.{name}")
    assert "nothing is kept" in said
    assert "figures: /" in said and str(Path(bench.__file__).parent) not in said


@pytest.mark.parametrize("test", DRAWN.values())
def test_what_draws_kept_figures_has_tests_of_its_own(test: str) -> None:
    assert Path(__file__).with_name(test).is_file()


@pytest.mark.verl
@pytest.mark.e2e
@pytest.mark.timeout(TIMEOUT_S)
def test_the_run_that_they_share_trains_on_through_every_accident(planted_run: RunResult) -> None:
    assert planted_run.ok, f"{planted_run.reason}\n{planted_run.tail(60)}"
    assert [step["step"] for step in planted_run.steps] == list(range(1, STEPS + 1))
    log = planted_run.log.read_text()
    assert [plant for plant in PLANTED if f"planted: {plant.partition('@')[0]}" not in log] == []


@pytest.mark.verl
@pytest.mark.e2e
def test_its_even_steps_go_without_the_monitor(planted_run: RunResult) -> None:
    record = load_run(record_of(planted_run.log.parent))
    assert {step % 2 for step in record.mismatch} == {1}


@pytest.mark.verl
@pytest.mark.e2e
def test_its_sampler_is_proved_in_another_dtype_than_its_learner(planted_run: RunResult) -> None:
    ledger: dict[str, Any] = json.loads((record_of(planted_run.log.parent) / "ledger.json").read_text())
    assert ablation.proved(ledger["roles"]) == ablation.wanted("fp16/bf16")
