"""The gradients of a module that FSDP has sharded: their dtypes, and their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fp16_patch.runtime.activation import ledger
from fp16_patch.scaling.tensor_range import local_part


def note_gradients(module: nn.Module, role: str) -> None:
    """Note the dtypes of gradients and of the parameters they are for, before a step."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    ledger().note(role, "gradient", *(parameter.grad.dtype for parameter in parameters))
    ledger().note(role, "master", *(parameter.dtype for parameter in parameters))


def local_gradients(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and local shard of every gradient, FSDP1's flat parameters taken apart into what they hold."""
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        name = name.replace("_fsdp_wrapped_module.", "")
        local = local_part(parameter.grad)
        if hasattr(parameter, "_fqns"):
            yield from _flat_gradients(name, parameter, local)
        else:
            yield name, local


def _flat_gradients(name: str, flat: Any, gradient: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    prefix = name.removesuffix("_flat_param")
    shards = getattr(flat, "_shard_param_infos", None)
    if shards is None:
        yield f"{prefix}{'|'.join(flat._fqns)}", gradient
        return
    for fqn, shard in zip(flat._fqns, shards, strict=True):
        if shard.in_shard:
            start = shard.offset_in_shard
            yield prefix + fqn, gradient.flatten()[start : start + shard.numel_in_shard]
