"""What is noted of a sampler whose model lives in the trainer's workers; vLLM itself is not there to run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl")
torch = pytest.importorskip("torch")

import fp16_patch
from fp16_patch import Plan

pytestmark = pytest.mark.verl


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(2, 2, dtype=torch.float16)

    def load_weights(self, weights: Any) -> None:
        for _, weight in weights:
            self.head.weight.data.copy_(weight)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


@pytest.fixture
def worker() -> Iterator[Any]:
    runner = SimpleNamespace(model=Model(), kv_caches=[torch.zeros(1, dtype=torch.float16)], kv_cache_config=None)
    fp16_patch.deactivate()
    fp16_patch.activate(Plan(strict=False))
    yield SimpleNamespace(model_runner=runner)
    fp16_patch.deactivate()


def in_its_own_worker(worker: Any) -> Any:
    return SimpleNamespace(worker=worker)


def in_this_process(worker: Any) -> Any:
    driver = SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))
    return SimpleNamespace(llm_engine=SimpleNamespace(model_executor=driver))


def noted(worker: Any) -> dict[str, list[str]]:
    from fp16_patch.runtime.activation import ledger

    worker.model_runner.model.compute_logits(torch.zeros(1, 2, dtype=torch.float16))
    return ledger().roles["rollout"]


EXPECTED = {
    "wire": ["float32"],
    "engine_weight": ["float16"],
    "kv_cache": ["float16"],
    "activation": ["float16"],
    "gemm_sum": ["float32"],
}
WEIGHTS = {"head.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("engine", [in_its_own_worker, in_this_process])
def test_wire_weights_cache_and_activations_are_noted(worker: Any, engine: Any) -> None:
    from fp16_patch.verl.legacy.rollout import update_weights

    async def wrapped(weights: Any, **_kwargs: Any) -> None:
        worker.model_runner.model.load_weights(weights)

    rollout = SimpleNamespace(inference_engine=engine(worker))
    for _ in range(2):
        asyncio.run(update_weights(wrapped, rollout, (iter(WEIGHTS.items()),), {"base_sync_done": True}))
    assert noted(worker) == EXPECTED
    assert worker.model_runner.model.head.weight.eq(1).all()


def test_the_same_of_a_sharding_manager(worker: Any) -> None:
    from fp16_patch.verl.legacy.rollout import update_params

    manager = SimpleNamespace(inference_engine=in_this_process(worker))
    update_params(
        lambda updated_params, peft_config: worker.model_runner.model.load_weights(updated_params.items()),
        manager,
        (WEIGHTS,),
        {"peft_config": None},
    )
    assert noted(worker) == EXPECTED
