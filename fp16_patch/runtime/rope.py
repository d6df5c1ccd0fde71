"""Keeps the frequencies of rotary position embeddings in FP32, whatever a model's weights are stored in.

A rotation turns by position × frequency, so what rounding takes from a frequency grows with the position: of a model
that is rounded whole, buffers too, the late tokens' log-probs are another model's. vLLM computes them in FP32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fp16_patch.plan.errors import Conflict, PlanError


def dtypes(module: nn.Module) -> list[torch.dtype]:
    """Return the dtypes of all frequencies that the module holds."""
    return [buffer.dtype for name, buffer in module.named_buffers() if "inv_freq" in name]


def restore(module: nn.Module, key: str, value: object, fix: str) -> None:
    """Compute frequencies again in FP32, where they were rounded with the weights.

    Args:
        module: changed in place. Its frequencies may be on the meta device.
        key: the setting through which they were rounded, with its value and what to set instead, for the error.

    Raises:
        PlanError: an embedding cannot be made anew from what it holds.
    """
    for rotary in module.modules():
        own = dict(rotary.named_buffers(recurse=False))
        if any("inv_freq" in name and buffer.dtype is not torch.float32 for name, buffer in own.items()):
            for name, buffer in _rebuilt(rotary, key, value, fix).named_buffers(recurse=False):
                rotary.register_buffer(name, buffer.float().to(own[name].device), persistent=False)


def _rebuilt(rotary: Any, key: str, value: object, fix: str) -> nn.Module:
    """Make a rotary embedding anew: language models' take their configuration, vision towers' a size and a base."""
    kind = type(rotary)
    try:
        return kind(rotary.config) if hasattr(rotary, "config") else kind(rotary.dim, rotary.theta)
    except (AttributeError, TypeError) as problem:
        reason = f"it rounds the RoPE frequencies of {kind.__name__}, and they cannot be computed again ({problem})"
        raise PlanError([Conflict(key, value, reason, fix)]) from problem
