"""verl's own trainer with VeOmni's engine, from its own command line: actor and reference on two ranks, and vLLM."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.vllm, pytest.mark.e2e]
pytest.importorskip("verl")
if find_spec("vllm") is None or find_spec("veomni") is None:
    pytest.skip("vLLM or VeOmni is not installed here", allow_module_level=True)

from fp16_patch.mismatch.record.reading import load_run
from integration.cpu.launch import RunResult
from tests.e2e.verl_runs import STEPS, TIMEOUT_S, finished, ledger, record


@pytest.fixture(scope="session")
def one_flag(start_verl: Callable[..., RunResult]) -> RunResult:
    """`external_lib=fp16_patch.verl` beside `model_engine=veomni`."""
    return finished(start_verl("fp16_patch", strategy="veomni", ranks=2, use_ref=True))


@pytest.fixture(scope="session")
def bf16(start_verl: Callable[..., RunResult]) -> RunResult:
    """Stock, observed."""
    return finished(start_verl("bf16", strategy="veomni", ranks=2, use_ref=True))


@pytest.mark.timeout(TIMEOUT_S)
def test_one_flag_puts_learners_and_sampler_into_float16(one_flag: RunResult) -> None:
    found = ledger(one_flag)
    assert {(process["mode"], process["problem"]) for process in found["processes"]} == {("fp16", None)}
    computed = ("autocast", "parameter", "activation")
    for role in ("actor", "ref"):
        assert {name: found["roles"][role][name] for name in computed} == dict.fromkeys(computed, ["float16"])
        assert found["roles"][role]["log_prob"] == ["float32"]
    assert found["roles"]["actor"]["master"] == found["roles"]["actor"]["gradient"] == ["float32"]
    assert found["roles"]["rollout"]["engine_weight"] == ["float16"]


@pytest.mark.timeout(TIMEOUT_S)
def test_three_more_bits_show_on_the_same_seeds(one_flag: RunResult, bf16: RunResult) -> None:
    assert ledger(bf16)["roles"]["actor"]["activation"] == ["bfloat16"]
    runs = [load_run(record(result)) for result in (bf16, one_flag)]
    for run in runs:
        assert sorted(run.coverage) == list(range(1, STEPS + 1))
        assert all(coverage.complete for coverage in run.coverage.values())
    stock, ours = (run.summary()["mismatch"]["mean_abs"] for run in runs)
    assert stock / ours >= 7
