"""Notes what a vLLM worker holds and computes in, by names that its model runner has in every V1 release."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fp16_patch.runtime.activation import ledger, our_part
from fp16_patch.samplers.holdings import note_weights, tell

# The second one where each rank samples from a part of the batch: `enable_batch_sharded_sampling`.
_HEADS = ("compute_logits", "compute_logits_local")
_NOTING_HIDDEN_STATES = our_part("what notes the dtype of hidden states")


def note_engine(role: str, worker: Any) -> bool:
    """Note the dtypes of a worker's weights and KV cache as they are now, and what it keeps; True if one is new."""
    runner = worker.model_runner
    new_cache = ledger().note(role, "kv_cache", *_attention_cache_dtypes(runner))
    new_weight = note_weights(role, runner.model, getattr(getattr(runner, "drafter", None), "model", None))
    return new_cache or new_weight


def watch_hidden_states(role: str, worker: Any) -> None:
    """Note, at the worker's next forward, the dtype of the activations that reach the language-model head."""
    # Outside vLLM's compiled graph, and gone after the first call.
    model = worker.model_runner.model
    heads = {name: getattr(model, name) for name in _HEADS if hasattr(model, name)}

    def watched(head: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for name, original in heads.items():
            setattr(model, name, original)
        _NOTING_HIDDEN_STATES.run(lambda: _note_hidden_states(role, hidden_states))
        return head(hidden_states, *args, **kwargs)

    for name, head in heads.items():
        setattr(model, name, partial(watched, head))


def _note_hidden_states(role: str, hidden_states: torch.Tensor) -> None:
    ledger().note(role, "activation", hidden_states.dtype)
    tell()


def _attention_cache_dtypes(runner: Any) -> set[torch.dtype]:
    """Return the dtypes of the KV cache as allocated, or as specified where other state shares its pages.

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
