"""How large a model's numbers get in one pass, by module: where they leave FP16 first, and which loss scale fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fp16_patch.scaling.tensor_hooks import TensorHooks

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
FP16_SMALLEST = 2.0**-24
"""The smallest subnormal number; what is below half of it becomes 0."""

OUTPUT, GRADIENT, PARAMETER = "output", "gradient of the output", "gradient of a parameter"
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class TensorSite(NamedTuple):
    """Which module's tensor it is, which one (`OUTPUT`, `GRADIENT` or `PARAMETER`), and its dtype."""

    module: str
    kind: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.module or 'the model'} ({self.kind})"


class AbsMaxHooks(TensorHooks):
    """Records the largest |number| of every module's outputs, their gradients, and the parameters' gradients.

    Of this rank. Gradients are seen in the dtype they are computed in, before ranks and micro-batches add them up.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._largest: dict[TensorSite, Tensor] = {}
        self._hooked_parameters = WeakIdKeyDictionary()

    def largest(self) -> dict[TensorSite, float]:
        """Return the largest |number| by site, in the order of computation; NaN where one of the numbers is."""
        if not self._largest:
            return {}
        device = next(iter(self._largest.values())).device
        values = torch.stack([value.double().to(device) for value in self._largest.values()]).tolist()
        return dict(zip(self._largest, values, strict=True))

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        # Sharded parameters are whole, and in the dtype they compute in, only while their module runs.
        for parameter in (*module._parameters.values(), *vars(module).values()):
            if not isinstance(parameter, Tensor) or not parameter.requires_grad:
                continue
            # Also a piece of a flat parameter: where checkpointing computes a module twice, it may still be the same.
            if parameter in self._hooked_parameters:
                continue
            self._hooked_parameters[parameter] = True
            handle = parameter.register_hook(partial(self._record_parameter, name, module, parameter))
            if parameter.is_leaf:
                self.handles.append(handle)

    def _record_parameter(self, name: str, module: nn.Module, parameter: Tensor, gradient: Tensor) -> None:
        # Megatron's fused kernel has added it up in FP32 itself, and hands on a tensor that nobody has filled.
        if not getattr(parameter, "grad_added_to_main_grad", False):
            self.record(name, module, PARAMETER, gradient)

    def leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for value in _floating_tensors(output):
            self.look(value, partial(self.record, name, module, OUTPUT), partial(self.record, name, module, GRADIENT))

    def record(self, name: str, module: nn.Module, kind: str, value: Tensor) -> None:
        local = local_part(value)
        if local.numel() == 0:
            return
        site, reach = TensorSite(plain_name(name), kind, local.dtype), abs_max(local)
        known = self._largest.get(site)
        self._largest[site] = reach if known is None else torch.maximum(known, reach)


def abs_max(values: Tensor) -> Tensor:
    """Return the largest |number|, 0-dim, without a copy of what may be a micro-batch's logits; NaN if one is."""
    least, most = torch.aminmax(values)
    return torch.maximum(-least, most)


def local_part(value: Tensor) -> Tensor:
    """Return what of it is on this rank."""
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local.detach()


def first_nonfinite(largest: Mapping[TensorSite, float]) -> TensorSite | None:
    """Return where a pass first computed inf or NaN; what comes behind it may be its consequence."""
    return next((site for site, value in largest.items() if not math.isfinite(value)), None)


def forward_is_nan(largest: Mapping[TensorSite, float]) -> bool:
    """Return whether a module's output was NaN. Infinite ones may be meant, as what a router masks is."""
    return any(math.isnan(value) for site, value in largest.items() if site.kind == OUTPUT)


def largest_gradient(largest: Mapping[TensorSite, float], dtype: torch.dtype) -> float:
    """Return the largest |gradient| computed in this dtype: 0 without any, infinite where one is not finite."""
    reach = [value for site, value in largest.items() if site.kind != OUTPUT and site.dtype is dtype]
    return max((value if math.isfinite(value) else math.inf for value in reach), default=0.0)


@cache
def plain_name(name: str) -> str:
    """Return a module's name without what FSDP, checkpointing and torch.compile put into it."""
    for wrapper in _WRAPPERS:
        name = (name + ".").replace(wrapper, "").removesuffix(".")
    return name


def _floating_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating_tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _floating_tensors(value)
