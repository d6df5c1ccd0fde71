"""Hooks into verl's vLLM processes: what a server expects of its children, and the dtypes its workers hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp16_patch.patching.call_arguments import argument
from fp16_patch.samplers.holdings import begins_a_sync, note_held, note_wire, role, tell
from fp16_patch.verl.samplers.server import begin_server
from fp16_patch.vllm.engine import note_engine, watch_hidden_states


def build_cli_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`build_cli_args_from_config`, a vLLM server's last call before it starts children: expect them to attest.

    Not a method of the server: Ray sends an actor's class by value, and a wrapper on its methods is lost on the way.
    """
    begin_server("server", _children_of(argument(wrapped, args, kwargs, "config")))
    return wrapped(*args, **kwargs)


def monkey_patch_model(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`vLLMColocateWorkerExtension.monkey_patch_model`, called once the engine is up: note weights and KV cache."""
    result = wrapped(*args, **kwargs)
    note_engine(role(), worker)
    watch_hidden_states(role(), worker)
    tell()
    return result


def update_weights(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`vLLMColocateWorkerExtension._update_weights`: note what came over the wire and what it became."""
    weights = argument(wrapped, args, kwargs, "weights")
    result = wrapped(*args, **kwargs)
    new = note_wire(role(), weights)
    if (begins_a_sync(worker, (name for name, _ in weights)) and note_engine(role(), worker)) or new:
        tell()
    return result


def update_weights_from_ipc(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`vLLMColocateWorkerExtension.update_weights_from_ipc`, a whole sync: note which weights have come of it."""
    result = wrapped(*args, **kwargs)
    layout = worker.vllm_config.parallel_config
    # Where experts move between ranks by their load, two samplers may hold other ones.
    if not getattr(layout, "enable_eplb", False):
        part = layout.data_parallel_rank, layout.tensor_parallel_size, layout.pipeline_parallel_size, worker.rank
        note_held(part, worker.model_runner.model)
        tell()
    return result


def _children_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Return how many processes of each kind a vLLM server with these arguments starts on its node."""
    replicas = int(arguments.get("data_parallel_size", 1))
    on_this_node = int(arguments.get("data_parallel_size_local", replicas))
    workers = int(arguments["tensor_parallel_size"]) * int(arguments.get("pipeline_parallel_size", 1)) * replicas
    nodes = int(arguments.get("nnodes", 1))
    # With several nodes and one replica, the engine is on the first and the others run workers only.
    engines = on_this_node if nodes == 1 or replicas > 1 or int(arguments["node_rank"]) == 0 else 0
    return {"engine_core": engines, "sampler_worker": workers // nodes}
