"""Notes what a sampler's process holds, gets and computes in, and tells the process that started it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from typing import Any

import torch

from fp16_patch.plan.guard import Guard
from fp16_patch.plan.plan import ROLE_ENV
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import attestation, current_plan, ledger, our_part
from fp16_patch.runtime.fp32_weights import end_of

logger = logging.getLogger(__name__)

_FIRST_WEIGHT = "_fp16_patch_first_weight"
_DIGESTED_WEIGHTS, _DIGESTED_VALUES = 32, 256
_COMPARING = Guard(logger, "this sampler's weights are not compared with the others'")
_WATCHING = our_part("what notes the dtypes that a sampler's modules compute in")


def role() -> str:
    """Return what this process samples for: `rollout`, or what its server was started for."""
    return os.environ.get(ROLE_ENV, "rollout")


def note_weights(role: str, model: Any, *drafters: Any) -> bool:
    """Note the dtypes of a model's weights as they are now, and what it keeps in others; True if one is new.

    Args:
        drafters: models that draw ahead for it, of which only what they keep is noted; None for one that is not there.
    """
    weights = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    new_weight = ledger().note(role, "engine_weight", *weights)
    new_kept = _note_kept(role, [model, *drafters])
    return new_weight or new_kept


def note_held(rank: object, model: Any) -> None:
    """Note which weights this process holds now that a sync is over; the driver compares it with other samplers.

    Nothing depends on it: an error is one warning. Adapters that stay beside the weights are not in it.

    Args:
        rank: which part of the model this process has; the same part in another sampler holds the same.
    """
    digest = _COMPARING.run(lambda: _digest(model))
    ledger().held = None if digest is None else {"rank": str(rank), "digest": digest}


def _digest(model: Any) -> str:
    """Return a digest of some values of some weights: an update changes many, if not each of them in 16 bits."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point() and weight.numel()]
    chosen = weights[:: max(1, len(weights) // _DIGESTED_WEIGHTS)]
    # As they lie in memory: to flatten a weight that is stored transposed would copy all of it.
    values = [weight.detach().as_strided((min(weight.numel(), _DIGESTED_VALUES),), (1,)).double() for weight in chosen]
    return hashlib.sha256(torch.cat(values).cpu().numpy().tobytes()).hexdigest()[:16] if values else ""


def note_wire(role: str, weights: Iterable[tuple[str, torch.Tensor]]) -> bool:
    """Note in which dtypes weights arrived; True if one is new."""
    return ledger().note(role, "wire", *{weight.dtype for _, weight in weights if weight.is_floating_point()})


def begins_a_sync(receiver: Any, names: Iterable[str]) -> bool:
    """Return whether these are the first weights of a sync: they arrive in buckets, and a walk is of all that is held.

    A sync sends the same weights as the one before, and begins with the same.

    Args:
        receiver: what holds the model; the first name is kept with it.
    """
    first = next(iter(names), None)
    if not hasattr(receiver, _FIRST_WEIGHT):
        setattr(receiver, _FIRST_WEIGHT, first)
    return bool(getattr(receiver, _FIRST_WEIGHT) == first)


def tell() -> None:
    """Leave this process's record, as it is now, with the process that started it."""
    propagation.publish(attestation())


def watch_modules(role: str, model: torch.nn.Module) -> None:
    """Note in which dtype each of the model's modules computes, once, when it is called next; leave what is new.

    What is compiled is not seen: there a hook would break the graph.
    """
    for module in model.modules():
        _watch_module(role, module)


def _watch_module(role: str, module: torch.nn.Module) -> None:
    def first(module: Any, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        handle.remove()
        _WATCHING.run(lambda: _note_computed(role, output))

    handle = module.register_forward_hook(first)


def _note_computed(role: str, output: Any) -> None:
    if ledger().note(role, "module_output", *(each.dtype for each in _tensors(output) if each.is_floating_point())):
        tell()


def _tensors(output: Any) -> Iterable[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return (output,)
    return (each for each in output if isinstance(each, torch.Tensor)) if isinstance(output, (tuple, list)) else ()


def _note_kept(role: str, models: Iterable[Any]) -> bool:
    if not current_plan().overrides_dtype:
        return False
    present = [model for model in models if model is not None]
    parts = {"parameters": "named_parameters", "buffers": "named_buffers"}
    return ledger().note_kept(role, **{kind: _kept_in(present, listing) for kind, listing in parts.items()})


def _kept_in(models: Iterable[Any], listing: str) -> set[str]:
    """Return the ends of the names of all floating weights in another dtype than the plan's."""
    planned = current_plan().torch_dtype
    return {
        end_of(name)
        for model in models
        if hasattr(model, listing)
        for name, weight in getattr(model, listing)()
        if weight.is_floating_point() and weight.dtype != planned
    }
