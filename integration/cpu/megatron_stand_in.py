"""Modules under Megatron's names, so that verl's Megatron code can be imported where there is no GPU to run it on.

Whatever is asked of such a module is there, and does nothing: a class that takes any arguments and keeps those with a
name. What a test needs to do something, it puts there itself. Anything that is installed is found before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("megatron", "mbridge")
# What verl imports by a star from them.
_TYPES = ("BaseInferenceContext", "Optional", "PackedSeqParams", "Tensor", "Tuple", "Union")
_STARS = {
    "megatron.core.models.common.embeddings.rope_utils": (),
    "megatron.core.transformer.attention": ("SelfAttention", *_TYPES),
    "megatron.core.transformer.transformer_block": ("TransformerBlock", "WrappedTensor", *_TYPES),
}


class _Anything(type):
    """A class of which every attribute is its own name, as that of an enumeration's member."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class StandIn(metaclass=_Anything):
    """Takes any arguments; those with a name are its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


class _Module(ModuleType):
    __path__: list[str] = []
    __version__ = "0.15.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (StandIn,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name)
        if spec.name in _STARS:
            module.__all__ = _STARS[spec.name]  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Let modules of Megatron be found in this process from now on."""
    sys.meta_path.append(_Finder())


@contextmanager
def installed() -> Iterator[None]:
    """Let them be found meanwhile; code that was imported then keeps what it has."""
    install()
    finder = sys.meta_path[-1]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Module)]:
            del sys.modules[name]
