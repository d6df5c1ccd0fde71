"""What a vLLM worker holds and computes in, by the names its model runner has had in every V1 release."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fp16_patch import processes
from fp16_patch.activation import attestation, ledger


def note_engine(role: str, worker: Any) -> bool:
    """Note the dtypes of a worker's weights and KV cache as they are now; True if one is new."""
    runner = worker.model_runner
    weights = {parameter.dtype for parameter in runner.model.parameters() if parameter.is_floating_point()}
    new_weight = ledger().note(role, "engine_weight", *weights)
    new_cache = ledger().note(role, "kv_cache", *_attention_cache_dtypes(runner))
    return new_weight or new_cache


def watch_hidden_states(role: str, worker: Any) -> None:
    """Note, at the worker's next forward, the dtype of the activations that reach the language-model head."""
    # Outside vLLM's compiled graph, and gone after the first call.
    model = worker.model_runner.model
    compute_logits = getattr(model, "compute_logits", None)
    if compute_logits is None:
        return

    def watched(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        model.compute_logits = compute_logits
        ledger().note(role, "activation", hidden_states.dtype)
        processes.publish(attestation())
        return compute_logits(hidden_states, *args, **kwargs)

    model.compute_logits = watched


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
