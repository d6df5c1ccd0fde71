"""Notes what a scheduler of SGLang holds and computes in, by hooks that SGLang's own plugin interface sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fp16_patch.runtime.activation import ledger, our_part
from fp16_patch.samplers.holdings import begins_a_sync, note_weights, role, tell, watch_modules

_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_WATCHING = our_part("what watches the model of SGLang's scheduler")
_NOTING = our_part("what notes the dtypes of SGLang's scheduler")


def watch_model_runner() -> None:
    """Have SGLang call us once its model is loaded, and once its caches are there."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_RUNNER}.load_model", model_loaded, HookType.AFTER)
    HookRegistry.register(f"{_RUNNER}.initialize", initialized, HookType.AFTER)


def model_loaded(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """Note the weights; watch those that arrive from now on, the next forward pass, and what reaches its head.

    CUDA graphs are captured later, so that the pass is one that Python sees.
    """
    _WATCHING.run(lambda: _watch(runner))


def initialized(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """Note the KV cache, where this release has made it by now."""
    _NOTING.run(lambda: _note_and_tell(runner))


def _watch(runner: Any) -> None:
    if getattr(runner, "is_draft_worker", False):
        note_weights(role(), runner.model)
        return
    runner.model.load_weights = partial(_load_weights, runner, runner.model.load_weights)
    watch_modules(role(), runner.model)
    _watch_heads(runner)
    _note_and_tell(runner)


def _watch_heads(runner: Any) -> None:
    from sglang.srt.layers.logits_processor import LogitsProcessor

    # A model of images has it inside its language model; one that scores sequences has none.
    heads = [module for module in runner.model.modules() if isinstance(module, LogitsProcessor)]
    for head in heads:
        _at_first_call(head, lambda *called: _note_hidden_states(runner, *called))
    if not heads:
        # SGLang calls the method of the model, not the model.
        for part in runner.model.children():
            _at_first_call(part, lambda *_called: _note_and_tell(runner))


def _at_first_call(module: torch.nn.Module, note: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
    def first(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        _NOTING.run(lambda: note(args, kwargs))

    handle = module.register_forward_pre_hook(first, with_kwargs=True)


def _note_hidden_states(runner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
    ledger().note(role(), "activation", hidden_states.dtype)
    # Some releases make their caches after the model, but before it is first called.
    _note_and_tell(runner)


def _note_and_tell(runner: Any) -> None:
    note_weights(role(), runner.model)
    ledger().note(role(), "kv_cache", *_cache_dtypes(runner))
    tell()


def _cache_dtypes(runner: Any) -> set[torch.dtype]:
    """Return the dtypes of stored keys and values, and of what convolutions see; empty before there is a cache."""
    pool = getattr(runner, "token_to_kv_pool", None)
    # Of a hybrid model, only some layers have one. The others' recurrent states may be in FP32.
    pool = getattr(pool, "full_kv_pool", pool)
    states = getattr(getattr(runner, "req_to_token_pool", None), "mamba_pool", None)
    buffers = [getattr(pool, name, None) for name in ("k_buffer", "v_buffer", "kv_buffer")]
    buffers.append(getattr(getattr(states, "mamba_cache", None), "conv", None))
    return {tensor.dtype for listed in buffers if listed is not None for tensor in listed}


def _load_weights(
    runner: Any, load: Any, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any
) -> Any:
    arrived: dict[str, torch.dtype] = {}
    loaded = load(_noted(weights, arrived), *args, **kwargs)
    _NOTING.run(lambda: _note_sync(runner, arrived))
    return loaded


def _noted(
    weights: Iterable[tuple[str, torch.Tensor]], arrived: dict[str, torch.dtype]
) -> Iterator[tuple[str, torch.Tensor]]:
    # Not the weights themselves: this would keep a bucket's memory until all of it is loaded.
    for name, weight in weights:
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            arrived[name] = weight.dtype
        yield name, weight


def _note_sync(runner: Any, arrived: dict[str, torch.dtype]) -> None:
    new = ledger().note(role(), "wire", *arrived.values())
    if (begins_a_sync(runner, arrived) and note_weights(role(), runner.model)) or new:
        tell()
