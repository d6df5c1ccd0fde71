"""Hooks into verl's vLLM processes: what a server expects of its children, and the dtypes its workers hold."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fp16_patch.patching.call_arguments import argument
from fp16_patch.plan.plan import ROLE_ENV
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import attestation, ledger
from fp16_patch.vllm.engine import note_engine, watch_hidden_states

_FIRST_WEIGHT = "_fp16_patch_first_weight"


def build_cli_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`build_cli_args_from_config`, a vLLM server's last call before it starts children: expect them to attest.

    Not a method of the server: Ray sends an actor's class by value, and a wrapper on its methods is lost on the way.
    """
    ledger().kind = "server"
    os.environ[ROLE_ENV] = _role_of_this_server()
    propagation.expect_children(_children_of(argument(wrapped, args, kwargs, "config")))
    return wrapped(*args, **kwargs)


def monkey_patch_model(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`vLLMColocateWorkerExtension.monkey_patch_model`, called once the engine is up: note weights and KV cache."""
    result = wrapped(*args, **kwargs)
    note_engine(_role(), worker)
    watch_hidden_states(_role(), worker)
    propagation.publish(attestation())
    return result


def update_weights(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`vLLMColocateWorkerExtension._update_weights`: note what came over the wire and what it became."""
    weights = argument(wrapped, args, kwargs, "weights")
    result = wrapped(*args, **kwargs)
    arrived = {weight.dtype for _, weight in weights if weight.is_floating_point()}
    new = ledger().note(_role(), "wire", *arrived)
    if (_begins_a_sync(worker, weights) and note_engine(_role(), worker)) or new:
        propagation.publish(attestation())
    return result


def _begins_a_sync(worker: Any, weights: Sequence[tuple[str, Any]]) -> bool:
    """Return whether these are the first weights of a sync: verl calls us for each bucket, and a walk is of them all.

    A sync sends the same weights as the one before, and begins with the same.
    """
    first = next((name for name, _ in weights), None)
    if not hasattr(worker, _FIRST_WEIGHT):
        setattr(worker, _FIRST_WEIGHT, first)
    return bool(getattr(worker, _FIRST_WEIGHT) == first)


def _role() -> str:
    return os.environ.get(ROLE_ENV, "rollout")


def _children_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Return how many processes of each kind a vLLM server with these arguments starts on its node."""
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
