"""What a weight sync sends from verl's own FSDP engine to a real vLLM, and what that makes of it.

    python -m integration.bench.wire

The same weights after two updates, once as stock verl sends them and once as they are sent under the plan, from two
ranks; each is loaded into vLLM by verl's own extension of its worker, over weights of NaN, and compared to the last
bit. What the sampler keeps in another dtype is asked of that very sampler.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fp16_patch.runtime.fp32_weights import Kept, kept_by_samplers
from integration.bench.verl_updates import PLAN, Learner, asked, on_ranks
from integration.cpu.tiny_families import write_family
from integration.cpu.tiny_model import make_random_model

RANKS, UPDATES = 2, 2
_EXTENSION = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"


def measure(out: Path, seed: int) -> dict[str, Any]:
    """`wire_bytes_*`: of one copy of the weights; `sampler_bitwise`: whether both make the same sampler.

    That of a dense model, and of a mixture of experts whose router vLLM keeps in FP32.
    """
    dense = sync_of(make_random_model(out / "model"), seed)
    routed = sync_of(write_family("glm4_moe", out / "routed"), seed)
    return {
        "wire_bytes_stock": dense["bytes_stock"],
        "wire_bytes_ours": dense["bytes_ours"],
        "wire_bytes_ratio": dense["bytes_ours"] / dense["bytes_stock"],
        "wire_bytes_ratio_with_fp32_router": routed["bytes_ours"] / routed["bytes_stock"],
        "sampler_bitwise": dense["bitwise"] and routed["bitwise"],
    }


def sync_of(model: Path, seed: int) -> dict[str, Any]:
    """One model's sync: bytes, whether the sampler is the same, what it keeps, and in which dtype each weight went."""
    with tempfile.TemporaryDirectory(prefix="fp16_patch_bench_") as folder:
        request = {"model": str(model), "seed": seed, "folder": folder}
        stock = _learned({**request, "updates": 0, "kept": None}, {"VERL_USE_EXTERNAL_MODULES": "verl_on_cpu"})
        command = [sys.executable, "-m", "integration.bench.wire", "--sampler"]
        # As the frameworks set the second: without, vLLM sends no functions to its workers.
        server = {"FP16_PATCH_KIND": "server", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        loaded = asked(command, request, {**PLAN, **server})
    return {
        "bytes_stock": stock["bytes"],
        "bytes_ours": loaded["sent"]["bytes"],
        "bitwise": loaded["bitwise"],
        "bitwise_if_all_rounded": loaded["bitwise_if_all_rounded"],
        "kept": loaded["kept"],
        "dtypes": loaded["sent"]["dtypes"],
    }


def _learned(request: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    return asked(on_ranks("integration.bench.wire", RANKS, "--learner"), request, environment)


def answer_as_learner(request: dict[str, Any]) -> dict[str, Any]:
    """In a rank's process: the weights as stock sends them, then as they are sent once the sampler is known."""
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


def answer_as_sampler(request: dict[str, Any]) -> dict[str, Any]:
    """In the process that holds the engine: what it keeps, what the learner sends it then, and what becomes of that."""
    from vllm import LLM

    from fp16_patch.vllm.server import record_of_worker

    llm = LLM(request["model"], dtype="float16", enforce_eager=True, max_model_len=64, worker_extension_cls=_EXTENSION)
    kept: Kept | None = kept_by_samplers(llm.collective_rpc(record_of_worker))
    sent = _learned({**request, "updates": UPDATES, "kept": kept}, PLAN)
    (loaded,) = llm.collective_rpc(compared, args=(request["folder"],))
    return {"kept": kept, "sent": sent, **loaded}


def compared(worker: Any, folder: str) -> dict[str, bool]:
    """In vLLM's worker: whether its model, parameters and buffers, is the same with our weights as with stock's.

    And whether it were, too, if nothing had been kept from being rounded.
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


def _as_learner(work: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = answer_as_learner(work)
    dist.barrier()
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    return found if first else {}


def _answered(asked: Path, answered: Path, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if found := work(json.loads(asked.read_text(encoding="utf-8"))):
        answered.write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--learner", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sampler", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.learner or arguments.sampler:
        work = _as_learner if arguments.learner else answer_as_sampler
        _answered(*(arguments.learner or arguments.sampler), work=work)
        return
    out: Path = arguments.out.resolve() / "wire"
    out.mkdir(parents=True, exist_ok=True)
    measured = measure(out, arguments.seed)
    (out / "wire.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1))


# vLLM spawns its processes, and they import this file.
if __name__ == "__main__":
    main()
