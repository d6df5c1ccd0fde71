"""How far a model's numbers reach in one pass, by module: where they leave FP16 first, and which loss scale they bear.

The hooks are there for a single pass; a run that is not looked at pays nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OUTPUT, GRADIENT, PARAMETER = "output", "gradient of the output", "gradient of a parameter"
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class Place(NamedTuple):
    """Of which module's output or gradients, and of which dtype, a number is."""

    module: str
    kind: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.module or 'the model'} ({self.kind})"


class Extent:
    """The largest |number| of every module's outputs, of their gradients, and of the parameters', on this rank.

    Gradients are seen in the dtype they are computed in, before ranks and micro-batches add them up.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._largest: dict[Place, Tensor] = {}
        self._handles: list[Any] = []
        self._watched: set[int] = set()

    def __enter__(self) -> Extent:
        for name, module in self._model.named_modules():
            name = _plain(name)
            self._handles.append(module.register_forward_pre_hook(partial(self._before, name)))
            self._handles.append(module.register_forward_hook(partial(self._after, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def largest(self) -> dict[Place, float]:
        """In the order in which they were computed; NaN where one of the numbers is."""
        if not self._largest:
            return {}
        device = next(iter(self._largest.values())).device
        values = torch.stack([value.double().to(device) for value in self._largest.values()]).tolist()
        return dict(zip(self._largest, values, strict=True))

    def _before(self, name: str, module: nn.Module, _inputs: Any) -> None:
        # Sharded parameters are whole, and in the dtype they compute in, only while their module runs.
        for parameter in (*module._parameters.values(), *vars(module).values()):
            if not isinstance(parameter, Tensor) or not parameter.requires_grad:
                continue
            if parameter.is_leaf and id(parameter) in self._watched:
                continue
            self._watched.add(id(parameter))
            handle = parameter.register_hook(self._look(name, PARAMETER, module))
            if parameter.is_leaf:
                self._handles.append(handle)

    def _after(self, name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        for value in _tensors(output):
            self._look(name, OUTPUT, module)(value)
            if value.requires_grad:
                value.register_hook(self._look(name, GRADIENT, module))

    def _look(self, name: str, kind: str, module: nn.Module) -> Callable[[Tensor], None]:
        def look(value: Tensor) -> None:
            local = local_part(value)
            if local.numel() == 0:
                return
            place = Place(name, kind, local.dtype)
            # No copy of what may be a micro-batch's logits; NaN goes through all three.
            least, most = torch.aminmax(local)
            reach = torch.maximum(-least, most)
            known = self._largest.get(place)
            self._largest[place] = reach if known is None else torch.maximum(known, reach)

        return look


def local_part(value: Tensor) -> Tensor:
    """What of it is on this rank."""
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local.detach()


def first_nonfinite(largest: Mapping[Place, float]) -> Place | None:
    """Where a pass first computed inf or NaN; what comes behind it may be its consequence."""
    return next((place for place, value in largest.items() if not math.isfinite(value)), None)


def forward_is_nan(largest: Mapping[Place, float]) -> bool:
    """Whether a module's output was NaN. Infinite ones may be meant, as what a router masks is."""
    return any(math.isnan(value) for place, value in largest.items() if place.kind == OUTPUT)


def largest_gradient(largest: Mapping[Place, float], dtype: torch.dtype) -> float:
    """Of the gradients computed in this dtype, 0 without any; infinite where one is not finite."""
    reach = [value for place, value in largest.items() if place.kind != OUTPUT and place.dtype is dtype]
    return max((value if math.isfinite(value) else math.inf for value in reach), default=0.0)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = (name + ".").replace(wrapper, "").removesuffix(".")
    return name


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
