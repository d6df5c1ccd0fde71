"""A sync that rounds weights, or leaves out the adapters, is refused; adapters that are merged go out with the base."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from fp16_patch import Plan
from fp16_patch.patching.sources import Installed
from fp16_patch.verl.config import weight_sync
from fp16_patch.verl.config.weight_sync import BACKEND, MODEL, SAMPLER, leaves_out_adapters, weight_sync_conflicts

RANK = {f"{MODEL}.lora_rank": 8}
SEPARATE = {BACKEND: "nccl", "trainer.use_v1": True, "trainer.v1.trainer_mode": "separate_async"}
WORKER = """
class ActorRolloutRefWorker:
    async def update_weights(self, mode):
        if mode != "naive":
            weights, _ = self.actor.engine.get_per_tensor_param({})
            await self.checkpoint_engine.send_weights(weights)
            return
        self.actor.engine.get_per_tensor_param(base_sync_done=True)
"""


class Verl:
    """A release of verl whose worker is this."""

    def __init__(self, worker: str) -> None:
        self.worker = worker

    def read(self, module: str) -> str | None:
        return self.worker


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What is said of these settings, on a release that leaves out adapters."""
    monkeypatch.setattr(weight_sync, "Installed", lambda: Verl(WORKER.format("")))
    return lambda settings: [str(conflict) for conflict in weight_sync_conflicts(settings.get, Plan())]


@pytest.mark.parametrize(
    "adapter",
    [(f"{MODEL}.lora_rank", 8), (f"{MODEL}.lora.rank", 16), (f"{MODEL}.lora_adapter_path", "/adapter")],
)
@pytest.mark.parametrize(
    "settings",
    [
        SEPARATE,
        {BACKEND: "nixl"},
        {BACKEND: "nccl", "trainer.use_v1": True, "trainer.v1.trainer_mode": "sync", "async_training": {}},
        {BACKEND: "nccl", "rollout": {"nnodes": 1}},
    ],
    ids=["separate", "before 0.9", "fully async", "one step off"],
)
def test_adapters_that_would_not_arrive_are_refused(
    adapter: tuple[str, Any], settings: dict[str, Any], says: Callable[..., list[str]]
) -> None:
    key, value = adapter
    (said,) = says({**settings, key: value})
    assert said.startswith(f"{BACKEND}={settings[BACKEND]}: with {key}={value} it sends the base weights alone")
    assert "verl-project/verl#7495" in said
    assert f"Fix: set {MODEL}.lora.merge=true" in said


@pytest.mark.parametrize(
    "settings",
    [
        SEPARATE,
        {**SEPARATE, **RANK, f"{MODEL}.lora.merge": True},
        {**RANK, BACKEND: "naive"},
        {**RANK},
        {**RANK, BACKEND: "nccl", "trainer.use_v1": True, "trainer.v1.trainer_mode": "sync"},
        {**SEPARATE, f"{MODEL}.lora_rank": 0, f"{MODEL}.lora.rank": 0},
    ],
    ids=["none", "merged", "naive", "colocated", "not by the wire", "rank 0"],
)
def test_adapters_that_arrive_are_not_refused(settings: dict[str, Any], says: Callable[..., list[str]]) -> None:
    assert says(settings) == []


def test_a_release_that_sends_them_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mended = Verl(WORKER.format("base_sync_done=self.base_sync_done"))
    monkeypatch.setattr(weight_sync, "Installed", lambda: mended)
    assert list(weight_sync_conflicts({**SEPARATE, **RANK}.get, Plan())) == []
    assert not leaves_out_adapters(Verl("class ActorRolloutRefWorker: pass"))


@pytest.mark.verl
def test_the_installed_release_is_judged_as_its_worker_runs() -> None:
    """verl's own method, with an engine that notes what it is asked for."""
    import asyncio
    from types import SimpleNamespace

    if "send_weights" not in (Installed().read("verl.workers.engine_workers") or ""):
        pytest.skip("verl has checkpoint engines since 0.7.1")
    from verl.workers.engine_workers import ActorRolloutRefWorker

    update = inspect.unwrap(ActorRolloutRefWorker.update_weights)
    asked: list[dict[str, Any]] = []

    def get(**wanted: Any) -> tuple[Any, None]:
        asked.append(wanted)
        return iter(()), None

    async def send(*args: Any, **kwargs: Any) -> None:
        return None

    worker = SimpleNamespace(
        config=SimpleNamespace(rollout=SimpleNamespace(checkpoint_engine=SimpleNamespace(backend="nccl"))),
        actor=SimpleNamespace(engine=SimpleNamespace(get_per_tensor_param=get)),
        checkpoint_engine=SimpleNamespace(send_weights=send),
    )
    for _ in range(2):
        asyncio.run(update(worker))
    assert leaves_out_adapters(Installed()) == (not any(each.get("base_sync_done") for each in asked))


def test_adapters_that_sglang_gets_past_the_ledger_are_refused_unless_merged(says: Callable[..., list[str]]) -> None:
    (said,) = says({**RANK, SAMPLER: "sglang"})
    assert said.startswith(f"{SAMPLER}=sglang: with {MODEL}.lora_rank=8 it gets adapters by a way on which nobody sees")
    assert says({**RANK, SAMPLER: "sglang", f"{MODEL}.lora.merge": True}) == []
    assert says({**RANK, SAMPLER: "vllm"}) == []
