"""Compare what a weight sync sends from verl's own FSDP engine to a real vLLM, and what that makes of it.

    python -m integration.bench.wire

The same weights after two updates, once as stock verl sends them and once as they are sent under the plan, from two
ranks; each is loaded into vLLM by verl's own extension of its worker, over weights of NaN, and compared to the last
bit. What the sampler keeps in another dtype is asked of that very sampler.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fp16_patch.runtime.fp32_weights import Kept, kept_by_samplers
from integration.bench.command import Bench
from integration.bench.ranks import PLAN, STOCK, cpu_environment, on_ranks
from integration.bench.served import Served, questions, say
from integration.bench.verl_updates import Learner
from integration.cpu.tiny_families import write_family
from integration.cpu.tiny_model import make_random_model

RANKS, UPDATES = 2, 2
LEARNER = "integration.bench.wire:answer_as_learner"
_EXTENSION = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"


# A dense model, and a mixture of experts whose router vLLM keeps in FP32.
MODELS: dict[str, Callable[[Path], Path]] = {
    "dense": lambda out: make_random_model(out / "model"),
    "routed": lambda out: write_family("glm4_moe", out / "routed"),
}


@dataclass(frozen=True)
class Size:
    """Which of `MODELS` are synchronized."""

    models: tuple[str, ...] = tuple(MODELS)


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Measure `wire_bytes_*`, of one copy of the weights, and `sampler_bitwise`: whether both make the same sampler."""
    found = {name: sync_of(MODELS[name](out), seed) for name in size.models}
    ratios = {name: of["bytes_ours"] / of["bytes_stock"] for name, of in found.items()}
    first, *_ = found
    return {
        "wire_bytes_stock": found[first]["bytes_stock"],
        "wire_bytes_ours": found[first]["bytes_ours"],
        "wire_bytes_ratio": ratios[first],
        **({"wire_bytes_ratio_with_fp32_router": ratios["routed"]} if "routed" in ratios else {}),
        "sampler_bitwise": all(of["bitwise"] for of in found.values()),
    }


def sync_of(model: Path, seed: int) -> dict[str, Any]:
    """Synchronize one model: bytes, whether the sampler is the same, what it keeps, in which dtype each weight went."""
    with tempfile.TemporaryDirectory(prefix="fp16_patch_bench_") as folder:
        # Its engine and its worker need no processes of their own, each of which would import vLLM.
        server = {"FP16_PATCH_KIND": "server", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment = cpu_environment({**PLAN, **server})
        sampler = Served("integration.bench.wire:serve_sampler", (str(model),), environment, Path(folder) / "log.txt")
        try:
            request = {"model": str(model), "seed": seed, "folder": folder}
            stock = on_ranks(LEARNER, {**request, "updates": 0, "kept": None}, STOCK, RANKS)
            kept = sampler.ask("kept")
            sent = on_ranks(LEARNER, {**request, "updates": UPDATES, "kept": kept}, PLAN, RANKS)
            loaded = sampler.ask(folder)
        finally:
            sampler.close()
    return {
        "bytes_stock": stock["bytes"],
        "bytes_ours": sent["bytes"],
        "bitwise": loaded["bitwise"],
        "bitwise_if_all_rounded": loaded["bitwise_if_all_rounded"],
        "kept": kept,
        "dtypes": sent["dtypes"],
    }


def answer_as_learner(request: dict[str, Any]) -> dict[str, Any]:
    """Send the weights from this rank as stock does, then as they are sent once the sampler is known."""
    from fp16_patch.runtime.preflight import allow_training

    learner = Learner(Path(request["model"]), UPDATES)
    for number in range(request["updates"]):
        learner.update(request["seed"] + number, 1.0)
    sent = _synchronized(learner.engine, Path(request["folder"]) / "stock.pt")
    if request["kept"] is not None:
        allow_training(None, sampler_keeps=request["kept"])
        sent = _synchronized(learner.engine, Path(request["folder"]) / "ours.pt")
    return sent


def _synchronized(engine: Any, path: Path) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    weights = dict(engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)[0])
    if dist.get_rank() == 0:
        torch.save({name: weight.detach().clone() for name, weight in weights.items()}, path)
    dtypes = {name: str(weight.dtype).removeprefix("torch.") for name, weight in weights.items()}
    return {"bytes": sum(weight.nbytes for weight in weights.values()), "dtypes": dtypes}


def serve_sampler(model: str) -> None:
    """Hold a vLLM in this process: say what it keeps, then what becomes of the weights in a folder."""
    from vllm import LLM

    from fp16_patch.vllm.server import record_of_worker

    llm = LLM(model, dtype="float16", enforce_eager=True, max_model_len=64, worker_extension_cls=_EXTENSION)
    for asked in questions():
        if asked == "kept":
            kept: Kept | None = kept_by_samplers(llm.collective_rpc(record_of_worker))
            say(kept)
        else:
            (loaded,) = llm.collective_rpc(compared, args=(asked,))
            say(loaded)


def compared(worker: Any, folder: str) -> dict[str, bool]:
    """Compare in vLLM's worker whether its parameters and buffers are the same with our weights as with stock's.

    And whether they would be, too, if nothing had been kept from being rounded.
    """
    import torch

    sent = {name: torch.load(Path(folder) / f"{name}.pt") for name in ("stock", "ours")}
    stock, ours = _loaded(worker, sent["stock"]), _loaded(worker, sent["ours"])
    rounded = _loaded(worker, {name: weight.half() for name, weight in sent["ours"].items()})
    return {"bitwise": _equal(stock, ours), "bitwise_if_all_rounded": _equal(stock, rounded)}


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def _loaded(worker: Any, weights: dict[str, Any]) -> dict[str, Any]:
    import torch
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    model, config = worker.model_runner.model, worker.model_runner.vllm_config.model_config
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(math.nan)  # equal to nothing, so what is not loaded shows
    worker._update_weights(list(weights.items()), peft_config=None, base_sync_done=True)
    process_weights_after_loading(model, config, torch.device("cpu"))
    return {name: weight.detach().clone() for name, weight in [*model.named_parameters(), *model.named_buffers()]}


def show(measured: dict[str, Any], console: Console) -> None:
    console.print_json(data=measured)


BENCH = Bench("wire", measure, show, full=Size(), smoke=Size(("routed",)))

if __name__ == "__main__":
    BENCH.main(__doc__)
