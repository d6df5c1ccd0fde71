"""What a vLLM worker answers to its server, and as what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fp16_patch
from fp16_patch import Plan
from fp16_patch.runtime.activation import attestation, ledger
from fp16_patch.vllm import engine, server


class Model(torch.nn.Module):
    """A model of vLLM's, as far as a worker's record reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(2, 2, dtype=torch.float16)

    def compute_logits(self, hidden_states: Any) -> str:
        return "all"


class ShardingModel(Model):
    """As since vLLM 0.32, where each rank may sample from a part of the batch."""

    def compute_logits_local(self, hidden_states: Any) -> str:
        return "a part"


@pytest.fixture(autouse=True)
def planned() -> None:
    fp16_patch.activate(Plan())


def worker_of(model: Model) -> Any:
    return SimpleNamespace(model_runner=SimpleNamespace(model=model, kv_caches=[torch.zeros(1, dtype=torch.float16)]))


@pytest.mark.parametrize("before", ["process", "server"])
def test_a_worker_attests_as_one_whatever_its_environment_calls_it(before: str) -> None:
    ledger().kind = before
    assert server.record_of_worker(worker_of(Model()))["kind"] == "sampler_worker"


def test_the_process_that_holds_the_engine_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_holds_engine", False)
    ledger().kind = "server"
    own = worker_of(Model())
    llm = SimpleNamespace(collective_rpc=lambda ask: [ask(own)])
    server._fetch(SimpleNamespace(llm=llm))
    assert attestation()["kind"] == "server"


def test_an_engine_core_that_computes_keeps_its_name() -> None:
    ledger().kind = "engine_core"
    assert server.record_of_worker(worker_of(Model()))["kind"] == "engine_core"


@pytest.mark.parametrize(
    ("model", "head", "logits"),
    [(Model, "compute_logits", "all"), (ShardingModel, "compute_logits", "all"),
     (ShardingModel, "compute_logits_local", "a part")],
)  # fmt: skip
def test_activations_are_noted_at_whichever_head_is_called_first_and_the_heads_are_put_back(
    model: type[Model], head: str, logits: str
) -> None:
    watched = model()
    methods = {name: getattr(watched, name) for name in engine._HEADS if hasattr(watched, name)}
    engine.watch_hidden_states("rollout", worker_of(watched))
    assert getattr(watched, head)(torch.zeros(1, 2, dtype=torch.float16)) == logits
    assert ledger().roles["rollout"]["activation"] == ["float16"]
    assert {name: getattr(watched, name) for name in methods} == methods
    ledger()._seen.clear()
    assert getattr(watched, head)(torch.zeros(1, 2)) == logits
    assert "rollout" not in ledger().roles


def test_a_model_without_a_head_is_left_alone() -> None:
    engine.watch_hidden_states("reward", worker_of(torch.nn.Module()))
    assert "reward" not in ledger().roles
