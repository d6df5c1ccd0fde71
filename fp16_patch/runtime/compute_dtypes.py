"""Notes by forward hooks which dtypes a model really computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fp16_patch.runtime import rope
from fp16_patch.runtime.activation import ledger, our_part

_PART = our_part("what notes the dtypes of a layer")


def watch_compute(module: nn.Module, role: str) -> None:
    """Note for `role` what RoPE's frequencies are in, and what the linear layers compute in, at each forward."""
    ledger().note(role, "rope", *rope.dtypes(module))
    for linear in _first_linear_of_each_tower(module):
        watch_linear(linear, role)


def watch_linear(linear: nn.Module, role: str) -> ComputeWatch:
    """Note for `role` what one linear layer computes in, at each forward; it may return its bias beside the output."""
    watch = ComputeWatch(role)
    linear.register_forward_hook(watch)
    return watch


def _first_linear_of_each_tower(module: nn.Module) -> list[nn.Linear]:
    """Pick a linear layer of each stack of blocks: a batch may use only some of vision, audio and language."""
    towers: dict[str, nn.Linear] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            tower, blocks, _ = name.partition("layers.")
            towers.setdefault(tower if blocks else "", child)
    return list(towers.values())


class ComputeWatch:
    """Notes, as a forward hook, the dtypes a linear layer really computes in."""

    def __init__(self, role: str) -> None:
        self.role = role

    def __call__(self, linear: Any, inputs: Any, output: Any) -> None:
        _PART.run(lambda: self._note(linear, output))

    def _note(self, linear: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        device = output.device.type
        enabled = torch.is_autocast_enabled(device)
        ledger().note(self.role, "autocast", torch.get_autocast_dtype(device) if enabled else output.dtype)
        ledger().note(self.role, "parameter", linear.weight.dtype)
        ledger().note(self.role, "activation", output.dtype)
