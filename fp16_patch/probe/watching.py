"""The range of every tensor that an FP16 run would hold in FP16, by the module that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fp16_patch.probe.extremes import Range, RangeMeter
from fp16_patch.scaling.tensor_hooks import TensorHooks

FORWARD, BACKWARD, GENERATION = "forward", "backward", "generation"

# A weight is an operand of the first; of the second, as a rule, are queries and keys, or attention weights and values.
_LINEAR = {torch.nn.functional.linear, torch.addmm, torch.Tensor.addmm}
_PRODUCT = {
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.baddbmm,
    torch.einsum,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.bmm,
}
# Computed in FP32 whatever the model's dtype.
_FLOAT32_MODULES = ("RotaryEmbedding",)


class Site(NamedTuple):
    """Where a number was seen: in which phase, under which module of the model, and which of its tensors it is of.

    ``tensor`` is `input` or `output` of the module or of a linear map in it, `product` of two activations (attention
    scores), or `parameter NAME`; in the backward phase it is the gradient of that.
    """

    phase: str
    module: str
    tensor: str

    def __str__(self) -> str:
        return f"{self.module or 'the model'} ({self.tensor})"


class RangeWatch(TensorHooks):
    """Meters the range of every site, in the order in which they were first seen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._meters: dict[Site, RangeMeter] = {}
        self._modules: list[str | None] = []
        self._phase = FORWARD
        self._last: Tensor | None = None

    def ranges(self) -> dict[Site, Range]:
        """Return what was seen at every site."""
        return {site: meter.read() for site, meter in self._meters.items()}

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Look at what the model computes in this block. Gradients count as `backward`, whatever the phase."""
        with self, _Products(self):
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    self.handles.append(parameter.register_post_accumulate_grad_hook(self._parameter_hook(name)))
            self._phase = phase
            yield

    def note(self, tensor: str, value: Any) -> None:
        """Look at a value of the innermost module that is running, and at its gradient when there is one."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value is self._last:
            return
        module = self._modules[-1] if self._modules else ""
        if module is None:
            return
        self._last = value
        # A token at a time, looking at exponents as well would take longer than the model.
        forward = partial(self._meter(Site(self._phase, module, tensor)).look, exponents=self._phase != GENERATION)
        self.look(value, forward, partial(self._gradient, Site(BACKWARD, module, tensor)))

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        unseen = type(module).__name__.endswith(_FLOAT32_MODULES)
        self._modules.append(None if unseen else name)
        # Between attention and MLP the residual stream is nobody's output.
        if inputs and next(module.children(), None) is None:
            self.note("input", inputs[0])

    def leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for value in _tensors(output):
            self.note("output", value)
        self._modules.pop()

    def _gradient(self, site: Site, gradient: Tensor) -> None:
        # A gradient's site comes behind those of the forward pass, so its meter is not made before.
        self._meter(site).look(gradient)

    def _meter(self, site: Site) -> RangeMeter:
        return self._meters.setdefault(site, RangeMeter())

    def _parameter_hook(self, name: str) -> Callable[[Tensor], None]:
        module, _, leaf = name.rpartition(".")
        site = Site(BACKWARD, module, f"parameter {leaf}")

        def look(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._meter(site).look(parameter.grad)
            # Nobody steps here; kept, the gradients would take as much memory as the weights.
            parameter.grad = None

        return look


class _Products(TorchFunctionMode):  # type: ignore[misc]
    """Shows a watch the operands and results of matrix products, as attention scores are no module's output."""

    def __init__(self, watch: RangeWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _LINEAR:
            self._watch.note("input", args[1] if function in (torch.addmm, torch.Tensor.addmm) else args[0])
            self._watch.note("output", result)
        elif function in _PRODUCT:
            self._watch.note("product", result)
        return result


def _tensors(output: Any) -> Iterable[Any]:
    """Return what a module hands on. vLLM's norms give the residual stream beside their output, of the same shape."""
    if not isinstance(output, tuple | list):
        return (output if isinstance(output, Tensor) else getattr(output, "logits", None),)
    tensors = [value for value in output if isinstance(value, Tensor)]
    return [value for value in tensors if value.shape == tensors[0].shape]
