"""Count how often gradients are read and written, by each operation of torch that touches them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Of these, what is in the same memory afterwards is the argument itself: nothing is read.
_NO_READ = ("detach", "alias", "view", "_local", "resize_")


@dataclass
class GradientPasses(TorchDispatchMode):
    """Counts passes over the gradients of some parameters, while it is entered.

    Attributes:
        parameters: the gradients they have on entry are watched.
        operations: name of an operation → elements it read and wrote.
    """

    parameters: Iterable[Tensor]
    operations: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        gradients = [_local(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        self._watched = {gradient.untyped_storage().data_ptr() for gradient in gradients if gradient.numel()}
        self.elements = sum(gradient.numel() for gradient in gradients)
        self.bytes_each = gradients[0].element_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not name.startswith(_NO_READ):
            self._count(name, list(_arguments(func, args, kwargs)), unscales=kwargs.get("grad_scale") is not None)
        return func(*args, **kwargs)

    def _count(self, name: str, arguments: list[tuple[Any, Any]], unscales: bool) -> None:
        touched: dict[tuple[int, int], bool] = {}
        for argument, value in arguments:
            for tensor in filter(self._is_watched, map(_local, _tensors(value))):
                # Read once, however often an operation names it.
                place = tensor.data_ptr(), tensor.numel()
                touched[place] = touched.get(place, False) or _is_written(argument)
        # A fused optimizer declares that it writes gradients, and does so only where it unscales them.
        stays = name.startswith("_fused_") and not unscales
        read, written = self.operations.get(name, (0, 0))
        read += sum(numel for _, numel in touched)
        written += sum(numel for (_, numel), writes in touched.items() if writes and not stays)
        if read:
            self.operations[name] = (read, written)

    @property
    def passes(self) -> float:
        """Count how often each gradient was read, on average."""
        return sum(read for read, _ in self.operations.values()) / self.elements

    @property
    def bytes_per_element(self) -> float:
        """Count the bytes read and written for each element of the gradients."""
        return self.bytes_each * sum(map(sum, self.operations.values())) / self.elements

    def _is_watched(self, tensor: Tensor) -> bool:
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self._watched


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    schema = func._schema.arguments
    yield from zip(schema, args, strict=False)
    named = {argument.name: argument for argument in schema}
    yield from ((named[name], value) for name, value in kwargs.items() if name in named)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
