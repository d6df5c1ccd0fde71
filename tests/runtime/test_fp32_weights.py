"""What samplers keep in another dtype: noted by vLLM's workers, told by the check, matched by the ends of names."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fp16_patch.plan.plan import Plan
from fp16_patch.runtime import activation
from fp16_patch.runtime.fp32_weights import end_of, kept_by_samplers, stays, unmatched
from fp16_patch.runtime.ledger import Ledger, Record, missing_record

ROUTER = {"parameters": ["gate.weight", "gate.e_score_correction_bias"], "buffers": ["rotary_emb.cos_sin_cache"]}


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """This process's ledger under an FP16 plan, without patches."""
    monkeypatch.setattr(activation._state, "plan", Plan())
    monkeypatch.setattr(activation._state, "ledger", Ledger(kind="sampler_worker"))
    yield activation._state.ledger


def sampler(role: str = "rollout", **ends: set[str]) -> Record:
    ledger = Ledger(kind="sampler_worker")
    ledger.note(role, "engine_weight", "float16")
    if ends:
        ledger.note_kept(role, **{"parameters": set(), "buffers": set(), **ends})
    return ledger.record(Plan(), {})


def test_a_weight_stays_if_its_last_two_names_are_those_of_one_that_is_kept() -> None:
    assert end_of("model.layers.3.mlp.gate.weight") == "gate.weight"
    assert end_of("weight") == "weight"
    assert stays("model.layers.3.mlp.gate.weight", ROUTER)
    assert stays("language_model.model.layers.0.block_sparse_moe.gate.weight", ROUTER)
    assert not stays("model.layers.3.mlp.gate_proj.weight", ROUTER)
    assert not stays("gate.bias", ROUTER)


def test_a_kept_parameter_that_is_called_like_nothing_that_is_sent_is_named() -> None:
    sent = {"gate.weight", "q_proj.weight"}
    assert unmatched(ROUTER, sent) == ["gate.e_score_correction_bias"]
    # A buffer is mostly the sampler's own: a table of rotations, a scale.
    assert unmatched(ROUTER, {*sent, "gate.e_score_correction_bias"}) == []


def test_what_one_sampler_of_many_keeps_is_kept() -> None:
    records = [sampler(parameters={"gate.weight"}), sampler(parameters={"mixer.D"}, buffers={"attn._k_scale"})]
    kept = {"parameters": ["gate.weight", "mixer.D"], "buffers": ["attn._k_scale"]}
    assert kept_by_samplers(records) == kept
    assert kept_by_samplers([Ledger(kind="worker").record(Plan(), {}), *records]) == kept
    # A reward model gets no weights from the actor; vLLM keeps its head in FP32.
    assert kept_by_samplers([sampler("reward", parameters={"score.weight"}), *records]) == kept


@pytest.mark.parametrize(
    "silent",
    [
        sampler(),
        Ledger(kind="sampler_worker").record(Plan(), {}),
        missing_record("sampler_worker", "no attestation"),
        missing_record("sglang_scheduler", "no attestation"),
    ],
    ids=["of weights it has", "of all", "as it is not there", "as SGLang's is not there"],
)
def test_a_sampler_that_has_said_nothing_may_keep_anything(silent: Record) -> None:
    assert kept_by_samplers([sampler(parameters=set()), silent]) is None
    assert kept_by_samplers([]) is None


class Model(torch.nn.Module):
    def __init__(self, router: Any) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"gate": torch.nn.Linear(2, 2)}) for _ in range(2))
        self.head = torch.nn.Linear(2, 2)
        self.half()
        self.layers.to(router)
        self.register_buffer("cos_sin_cache", torch.ones(2))
        self.register_buffer("expert_map", torch.ones(2, dtype=torch.int64))


def worker(model: Any, **runner: Any) -> Any:
    caches = {"kv_caches": [torch.zeros(1, dtype=torch.float16)], "kv_cache_config": None}
    return SimpleNamespace(model_runner=SimpleNamespace(model=model, **caches, **runner))


def test_a_worker_notes_what_its_model_keeps(noting: Ledger) -> None:
    from fp16_patch.vllm.engine import note_engine

    routed = worker(Model(torch.float32))
    assert note_engine("rollout", routed)
    assert not note_engine("rollout", routed)
    kept = {"parameters": ["gate.bias", "gate.weight"], "buffers": ["cos_sin_cache"]}
    assert noting.record(Plan(), {})["keeps"] == {"rollout": kept}


def test_what_a_drafter_keeps_is_noted_too(noting: Ledger) -> None:
    from fp16_patch.vllm.engine import note_engine

    plain = Model(torch.float16)
    note_engine("rollout", worker(plain))
    assert noting.record(Plan(), {})["keeps"]["rollout"]["parameters"] == []
    drafting = SimpleNamespace(model=Model(torch.float32))
    assert note_engine("rollout", worker(plain, drafter=drafting))
    assert noting.record(Plan(), {})["keeps"]["rollout"]["parameters"] == ["gate.bias", "gate.weight"]


def test_a_plan_that_decides_no_dtype_has_nothing_kept(noting: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp16_patch.vllm.engine import note_engine

    monkeypatch.setattr(activation._state, "plan", Plan(mode="observe"))
    note_engine("rollout", worker(Model(torch.float32)))
    assert noting.record(Plan(), {})["keeps"] == {}
