"""The sampler of verl before 0.7.1, whose model lives in the trainer's workers: what it gets and what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fp16_patch.patching.call_arguments import argument, bound
from fp16_patch.runtime.activation import our_part
from fp16_patch.samplers.holdings import note_wire
from fp16_patch.vllm.engine import note_engine, watch_hidden_states

_ROLE = "rollout"
_WATCHED = "_fp16_patch_watched"
_NOTING_WEIGHTS = our_part("what notes the dtypes of weights on their way to the sampler")


async def update_weights(wrapped: Any, rollout: Any, args: Any, kwargs: Any) -> Any:
    """`update_weights` of vLLM's rollouts: note what came over the wire and what it became."""
    call = bound(wrapped, args, kwargs)
    call.arguments["weights"] = _noted(call.arguments["weights"])
    result = await wrapped(*call.args, **call.kwargs)
    _note_sampler(rollout.inference_engine)
    return result


def update_params(wrapped: Any, manager: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPVLLMShardingManager.update_params`, in 0.5.0: note what came over the wire and what it became."""
    weights = argument(wrapped, args, kwargs, "updated_params")
    note_wire(_ROLE, weights.items())
    result = wrapped(*args, **kwargs)
    _note_sampler(manager.inference_engine)
    return result


def _noted(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for named in weights:
        _NOTING_WEIGHTS.run(partial(_note_weight, named))
        yield named


def _note_weight(named: tuple[str, torch.Tensor]) -> None:
    note_wire(_ROLE, [named])


def _note_sampler(engine: Any) -> None:
    # vLLM's own worker, or a whole engine in this process.
    driver = engine if hasattr(engine, "worker") else engine.llm_engine.model_executor.driver_worker
    worker = driver.worker
    note_engine(_ROLE, worker)
    if not hasattr(worker, _WATCHED):
        setattr(worker, _WATCHED, True)
        watch_hidden_states(_ROLE, worker)
