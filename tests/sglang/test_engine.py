"""The sampler's side on a real SGLang, reached by nothing but its plugin entry point."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.sglang

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed here", allow_module_level=True)
torch = pytest.importorskip("torch")

from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.ledger import Record, judge
from tests.conftest import sglang_environment
from tests.sglang.samplings import PROMPT, SAMPLINGS

HERE = Path(__file__).parent
# Some releases make the KV cache with the model, others when it is first needed.
CACHE = {"kv_cache": ["float16"], "gemm_sum": ["float32"]}
COMPUTED = {"engine_weight": ["float16"], **CACHE, "activation": ["float16"], "module_output": ["float16"]}
Facts = Mapping[str, Any]


@pytest.fixture(scope="module")
def facts_of(
    tiny_model: Path, warm_python_for_sglang: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Facts]:
    """Given the options of an engine, and of its environment: what it leaves. An engine runs once for all tests."""

    @functools.cache
    def facts(*options: str, plugins: str | None = None, path: Path | None = None) -> Facts:
        out = tmp_path_factory.mktemp("engine")
        environment = {**sglang_environment(), "FP16_PATCH": "1"}
        if path:
            environment["PYTHONPATH"] = os.pathsep.join([str(path), environment["PYTHONPATH"]])
        if plugins:
            environment["SGLANG_PLUGINS"] = plugins
        program, left = HERE / "engine.py", out / "facts.json"
        command = [str(warm_python_for_sglang), str(program), "--model", str(tiny_model), "--out", str(left), *options]
        result = subprocess.run(command, env=environment, cwd=out, text=True, capture_output=True, timeout=800)
        assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
        return dict(json.loads(left.read_text(encoding="utf-8")))

    return facts


@pytest.fixture
def fp16(facts_of: Callable[..., Facts]) -> Facts:
    """An engine in float16 that is sent bfloat16 weights at its end."""
    return facts_of("--wire", "bfloat16")


def rollout(records: list[Record]) -> dict[str, list[str]]:
    (scheduler,) = [record for record in records if record["kind"] == "sglang_scheduler"]
    row: dict[str, list[str]] = scheduler["roles"]["rollout"]
    return row


def findings(records: list[Record]) -> set[tuple[str, str]]:
    return {(finding.quantity, finding.seen) for finding in judge(records, Plan(mode="fp16"), {})}


def test_a_scheduler_attests_what_it_holds_and_then_what_it_computes_in(fp16: Facts) -> None:
    server, scheduler = fp16["held"]
    assert (server["kind"], scheduler["kind"]) == ("sglang_server", "sglang_scheduler")
    assert server["pid"] != scheduler["pid"]
    held = rollout(fp16["held"])
    assert held.pop("engine_weight") == ["float16"]
    assert held in ({}, CACHE)
    assert rollout(fp16["computed"]) == COMPUTED
    assert findings(fp16["computed"]) == set()
    # Cosines and sines, which no learner sends.
    assert scheduler["keeps"]["rollout"] == {"parameters": [], "buffers": ["rotary_emb.cos_sin_cache"]}


def test_weights_that_arrive_in_bfloat16_are_noticed_though_they_are_cast(fp16: Facts) -> None:
    assert rollout(fp16["synced"]) == {**COMPUTED, "wire": ["bfloat16"]}
    assert findings(fp16["synced"]) == {("wire", "bfloat16")}


def test_a_layer_that_is_forced_into_bfloat16_is_noticed(facts_of: Callable[..., Facts]) -> None:
    forced = facts_of(path=HERE / "forced_layer")
    assert rollout(forced["computed"]) == {**COMPUTED, "module_output": ["bfloat16", "float16"]}
    assert findings(forced["computed"]) == {("module_output", "bfloat16, float16")}


def test_an_engine_in_another_dtype_is_refused_for_all_that_it_holds(facts_of: Callable[..., Facts]) -> None:
    found = facts_of("--dtype", "bfloat16")["computed"]
    names = ("engine_weight", "kv_cache", "activation", "module_output")
    assert findings(found) == {(name, "bfloat16") for name in names}


def test_a_scheduler_that_was_kept_from_the_plugin_is_missed(facts_of: Callable[..., Facts]) -> None:
    server, missing = facts_of(plugins="sglang_on_cpu")["held"]
    assert server["problem"] is None
    assert (missing["kind"], missing["problem"].partition(":")[0]) == ("sglang_scheduler", "no attestation")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_log_probs_are_those_of_the_whole_vocabulary_at_the_temperature(
    sampling: str, fp16: Facts, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    learner = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16)
    tokens, log_probs = fp16["sampled"][sampling].values()
    with torch.no_grad():
        logits = learner(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1].float()
    whole = torch.log_softmax(logits / SAMPLINGS[sampling]["temperature"], -1)
    scored = whole.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    # Truncated ones would be larger by the log of what is left of the vocabulary: of half of it, by 0.7.
    assert torch.allclose(torch.tensor(log_probs), scored, atol=0.02)
