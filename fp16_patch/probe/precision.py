"""A model in the dtype that a learner or a sampler computes in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
HALF = (torch.float16, torch.bfloat16)

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.linear.default}


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of an FP32 model with its parameters rounded to ``dtype``; the model itself for float32.

    Buffers stay as they are: frameworks keep RoPE frequencies in FP32.
    """
    if dtype == torch.float32:
        return model
    # Parameters that the deep copy finds in its memo are not copied, so that both never stand in FP32.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(_rounded(parameter, dtype), requires_grad=False) for parameter in model.parameters()
    }
    copied = copy.deepcopy(model, memo)
    copied.config.dtype = dtype
    return copied


def _rounded(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return parameter.detach().to(dtype) if parameter.is_floating_point() else parameter.detach()


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
