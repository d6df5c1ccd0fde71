"""The engine-side check on a real vLLM, reached by nothing but its plugin entry point and `collective_rpc`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

pytest.importorskip("vllm")

from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.ledger import Record, judge
from integration.cpu.process import ENVIRONMENT

ROOT = Path(__file__).parents[2]
IN_FLOAT16 = ("--dtype", "float16", "--executor", "mp")
QUANTITIES = ("engine_weight", "kv_cache", "activation")
Facts = Mapping[str, Any]


@pytest.fixture(scope="module")
def facts_of(tiny_model: Path, warm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Facts]:
    """Given the options of an engine: what its processes attest. An engine runs once for all tests."""

    @functools.cache
    def facts(*options: str) -> Facts:
        return _run(warm_python, tiny_model, tmp_path_factory.mktemp("engine"), options)

    return facts


def _run(python: Path, model: Path, out: Path, options: tuple[str, ...]) -> Facts:
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
        "FP16_PATCH": "1",
        "FP16_PATCH_KIND": "server",
        # As the frameworks set it: without, vLLM sends no functions to its workers.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    program, left = Path(__file__).with_name("engine.py"), out / "facts.json"
    command = [str(python), str(program), "--model", str(model), "--out", str(left), *options]
    result = subprocess.run(command, env=environment, cwd=out, text=True, capture_output=True, timeout=600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    facts: Facts = json.loads(left.read_text(encoding="utf-8"))
    assert facts["tokens"] == 4
    return facts


def _rollout(records: list[Record]) -> dict[str, list[str]]:
    (record,) = records
    row: dict[str, list[str]] = record["roles"]["rollout"]
    return row


def _findings(records: list[Record]) -> list[Any]:
    return judge(records, Plan(mode="fp16"), {"rollout": QUANTITIES})


def test_every_process_of_an_engine_attests_by_itself(facts_of: Callable[..., Facts]) -> None:
    records = facts_of(*IN_FLOAT16)["left"]
    assert sorted(record["kind"] for record in records) == ["engine_core", "sampler_worker", "server"]
    assert len({record["pid"] for record in records}) == 3
    assert all(record["problem"] is None and record["mode"] == "fp16" for record in records)


def test_a_worker_records_what_it_holds_and_then_what_it_computes_in(facts_of: Callable[..., Facts]) -> None:
    facts = facts_of(*IN_FLOAT16)
    held = {"engine_weight": ["float16"], "kv_cache": ["float16"], "gemm_sum": ["float32"]}
    assert _rollout(facts["before"]) == held
    assert _rollout(facts["after"]) == {**held, "activation": ["float16"]}
    assert _findings(facts["answered"]) == []


def test_an_engine_in_another_dtype_is_refused_for_all_that_it_holds(facts_of: Callable[..., Facts]) -> None:
    # In the process that vLLM itself chooses for its worker: EngineCore, or one of its own.
    facts = facts_of("--dtype", "bfloat16")
    assert _rollout(facts["after"]) == {**dict.fromkeys(QUANTITIES, ["bfloat16"]), "gemm_sum": ["float32"]}
    found = {(finding.role, finding.quantity, finding.seen) for finding in _findings(facts["answered"])}
    assert found == {("rollout", quantity, "bfloat16") for quantity in QUANTITIES}


def test_an_engine_that_was_kept_from_the_plugin_is_refused(facts_of: Callable[..., Facts]) -> None:
    facts = facts_of(*IN_FLOAT16, "--without-plugins")
    _, engine_core = facts["left"]
    assert engine_core["kind"] == "engine_core"
    assert "no attestation: its plugin did not load" in engine_core["problem"]
    (worker,) = facts["after"]
    assert worker["problem"] == "fp16_patch is not active in this process"
    assert {finding.quantity for finding in _findings(facts["answered"])} == {"attestation", "gemm_sum"}
