"""A model in the dtype that a learner or a sampler computes in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALF = (torch.float16, torch.bfloat16)

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.linear.default}


def in_dtype(model: nn.Module, dtype: torch.dtype, *, held_wide: bool = False) -> nn.Module:
    """Return a copy of an FP32 model with its parameters rounded to ``dtype``; the model itself for float32.

    Buffers stay as they are: frameworks keep RoPE frequencies in FP32.

    Args:
        held_wide: hold the rounded weights of linear layers in FP32, for a CPU that multiplies in it anyway: where a
            token follows another, to widen the weights each time takes as long as the product.
    """
    if dtype == torch.float32:
        return model
    held_wide = held_wide and dtype in HALF
    wide = _only_looked_up_or_multiplied(model) if held_wide else set()
    # Parameters that the deep copy finds in its memo are not copied, so that no third copy ever stands.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(_rounded(parameter, dtype, id(parameter) in wide), requires_grad=False)
        for parameter in model.parameters()
    }
    copied = copy.deepcopy(model, memo)
    copied.config.dtype = dtype
    if held_wide:
        _compute_from_wide(copied, dtype)
    return copied


def _rounded(parameter: torch.Tensor, dtype: torch.dtype, wide: bool) -> torch.Tensor:
    if not parameter.is_floating_point():
        return parameter.detach()
    rounded = parameter.detach().to(dtype)
    return rounded.float() if wide else rounded


def _only_looked_up_or_multiplied(model: nn.Module) -> set[int]:
    """Return identities of weights in linear layers and embeddings only; a model's own classes may compute more."""
    ours: set[int] = set()
    others: set[int] = set()
    for module in model.modules():
        held = ours if type(module) in (nn.Linear, nn.Embedding) else others
        held |= {id(parameter) for parameter in module.parameters(recurse=False) if parameter.ndim > 1}
    return ours - others


def _compute_from_wide(model: nn.Module, dtype: torch.dtype) -> None:
    """Let these layers give, to the bit, what they would give from half-precision weights on a GPU."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_linear, module, dtype)
        elif type(module) is nn.Embedding:
            module.forward = partial(_looked_up, module, dtype)


def _linear(module: nn.Linear, dtype: torch.dtype, operand: torch.Tensor) -> torch.Tensor:
    bias = None if module.bias is None else module.bias.float()
    with torch.autocast(operand.device.type, enabled=False):
        return nn.functional.linear(operand.to(dtype).float(), module.weight, bias).to(dtype)


def _looked_up(module: nn.Embedding, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    return nn.Embedding.forward(module, ids).to(dtype)


@contextmanager
def computing_in(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Compute in ``dtype`` under autocast, as FSDP learners do; on a CPU with a GPU's products."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if dtype in HALF:
            stack.enter_context(torch.autocast(device, dtype))
            if device == "cpu":
                stack.enter_context(ProductsInFloat32())
        yield


class ProductsInFloat32(TorchDispatchMode):  # type: ignore[misc]
    """Matrix products of half-precision operands: summed up in FP32, rounded once.

    That is what GPUs do. A CPU without half-precision units does it some fifty times slower by itself.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        half = next((x.dtype for x in args if isinstance(x, torch.Tensor) and x.dtype in HALF), None)
        if function not in _PRODUCTS or half is None:
            return function(*args, **kwargs)
        wide = [x.float() if isinstance(x, torch.Tensor) and x.dtype in HALF else x for x in args]
        return function(*wide, **kwargs).to(half)
