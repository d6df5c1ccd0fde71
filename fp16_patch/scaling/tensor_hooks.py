"""Hooks on every module of a model, for the length of a `with` block. A pass outside of it pays nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

H = TypeVar("H", bound="TensorHooks")


class TensorHooks:
    """Calls `enter` before each module runs and `leave` after it. Subclasses say what they look at there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.handles: list[Any] = []
        """What the end of the block removes; subclasses add the hooks that they register."""

    def __enter__(self: H) -> H:
        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_pre_hook(partial(self.enter, name)))
            # After an error, too, so that every `enter` has its `leave`.
            self.handles.append(module.register_forward_hook(partial(self.leave, name), always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        """Look at a module that is about to run."""
        raise NotImplementedError

    def leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Look at what a module returned; None after an error."""
        raise NotImplementedError

    @staticmethod
    def look(value: Tensor, forward: Callable[[Tensor], None], backward: Callable[[Tensor], None]) -> None:
        """Show `forward` a value now, and `backward` its gradient once that is computed."""
        forward(value)
        if value.requires_grad:
            value.register_hook(backward)
