"""The sampler's processes: what a vLLM server expects of its children, and the dtypes its workers hold."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fp16_patch import processes
from fp16_patch.activation import attestation, ledger


def build_cli_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`build_cli_args_from_config`, what a vLLM server calls last before it starts EngineCore and the workers.

    Not a method of the server: Ray sends an actor's class by value, and a wrapper on its methods is lost on the way.
    """
    arguments = kwargs.get("config", args[0] if args else {})
    ledger().kind = "server"
    os.environ[processes.ROLE_ENV] = _role_of_this_server()
    processes.expect_children(_children_of(arguments))
    return wrapped(*args, **kwargs)


def monkey_patch_model(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`vLLMColocateWorkerExtension.monkey_patch_model`, called once the engine is up: note weights and KV cache."""
    result = wrapped(*args, **kwargs)
    _note_engine(worker)
    _watch_hidden_states(worker.model_runner.model)
    processes.publish(attestation())
    return result


def update_weights(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`vLLMColocateWorkerExtension._update_weights`: note what came over the wire and what it became."""
    weights = kwargs.get("weights", args[0] if args else ())
    result = wrapped(*args, **kwargs)
    arrived = {weight.dtype for _, weight in weights if weight.is_floating_point()}
    if ledger().note(_role(), "wire", *arrived) or _note_engine(worker):
        processes.publish(attestation())
    return result


def _role() -> str:
    return os.environ.get(processes.ROLE_ENV, "rollout")


def _children_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Kind → number of processes a vLLM server with these arguments starts on its node."""
    replicas = int(arguments.get("data_parallel_size", 1))
    on_this_node = int(arguments.get("data_parallel_size_local", replicas))
    workers = int(arguments["tensor_parallel_size"]) * int(arguments.get("pipeline_parallel_size", 1)) * replicas
    nodes = int(arguments.get("nnodes", 1))
    # With several nodes and one replica, the engine is on the first and the others run workers only.
    engines = on_this_node if nodes == 1 or replicas > 1 or int(arguments["node_rank"]) == 0 else 0
    return {"engine_core": engines, "sampler_worker": workers // nodes}


def _role_of_this_server() -> str:
    # Nothing tells the server what it is for, but the name verl gives its actor.
    name = _actor_name()
    return next((role for role in ("reward", "teacher") if f"server_{role}" in name), "rollout")


def _actor_name() -> str:
    import ray

    return str(ray.get_runtime_context().get_actor_name() or "")


def _note_engine(worker: Any) -> bool:
    runner = worker.model_runner
    weights = {parameter.dtype for parameter in runner.model.parameters() if parameter.is_floating_point()}
    new_weight = ledger().note(_role(), "engine_weight", *weights)
    new_cache = ledger().note(_role(), "kv_cache", *_attention_cache_dtypes(runner))
    return new_weight or new_cache


def _attention_cache_dtypes(runner: Any) -> set[torch.dtype]:
    """Dtypes of the KV cache as allocated, or as specified where other state shares its pages.

    Next to state-space layers, vLLM allocates pages of bytes and views them as each layer needs.
    """
    specs = list(_layer_specs(getattr(runner, "kv_cache_config", None)))
    if any(not hasattr(spec, "dtype") for spec in specs):
        return {spec.dtype for spec in specs if hasattr(spec, "dtype")}
    return {cache.dtype for cache in _tensors(runner.kv_caches)}


def _layer_specs(cache_config: Any) -> Iterator[Any]:
    for group in getattr(cache_config, "kv_cache_groups", ()):
        yield from getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()


def _tensors(caches: Any) -> Iterator[torch.Tensor]:
    if isinstance(caches, torch.Tensor):
        yield caches
    elif isinstance(caches, Iterable):
        for cache in caches:
            yield from _tensors(cache)


def _watch_hidden_states(model: Any) -> None:
    # Outside vLLM's compiled graph, and gone after the first call.
    compute_logits = getattr(model, "compute_logits", None)
    if compute_logits is None:
        return

    def watched(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        model.compute_logits = compute_logits
        ledger().note(_role(), "activation", hidden_states.dtype)
        processes.publish(attestation())
        return compute_logits(hidden_states, *args, **kwargs)

    model.compute_logits = watched
