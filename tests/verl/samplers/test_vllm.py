"""What verl's vLLM workers note of a weight sync, which comes in buckets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl")
torch = pytest.importorskip("torch")

import fp16_patch
from fp16_patch import Plan
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import ledger

pytestmark = pytest.mark.verl

BUCKETS = [["embedding.weight", "layers.0.weight"], ["layers.1.weight"], ["head.weight"]]


def received(weights: list[tuple[str, Any]], **_settings: Any) -> None:
    """verl's own method, as far as its arguments go."""


def test_all_parameters_are_walked_once_a_sync_and_not_at_every_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    fp16_patch.activate(Plan(strict=False))
    from fp16_patch.verl.samplers import vllm

    walked: list[str] = []
    monkeypatch.setattr(vllm, "note_engine", lambda role, worker: walked.append(role))
    worker = SimpleNamespace()
    for sync in range(3):
        for names in BUCKETS:
            weights = [(name, torch.zeros(1, dtype=torch.float16)) for name in names]
            vllm.update_weights(received, worker, (weights,), {})
        assert walked == ["rollout"] * (sync + 1)
    assert ledger().roles["rollout"]["wire"] == ["float16"]


def test_a_dtype_that_is_new_on_the_wire_is_published_in_any_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    fp16_patch.activate(Plan(strict=False))
    from fp16_patch.verl.samplers import vllm

    published: list[Any] = []
    monkeypatch.setattr(vllm, "note_engine", lambda role, worker: False)
    monkeypatch.setattr(propagation, "publish", published.append)
    worker = SimpleNamespace()
    for name, dtype in (("a", torch.float16), ("b", torch.float16), ("c", torch.bfloat16)):
        vllm.update_weights(received, worker, ([(name, torch.zeros(1, dtype=dtype))],), {})
    assert [record["roles"]["rollout"]["wire"] for record in published] == [["float16"], ["bfloat16", "float16"]]
