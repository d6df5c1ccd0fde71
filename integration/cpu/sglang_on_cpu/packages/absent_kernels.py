"""Stands in for packages of CUDA kernels: whatever is imported from them is there, and nothing of it can be used."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class Absent(type):
    """A name of such a package: a class, as some are inherited from; to call it is an error that names it."""

    def __call__(cls, *_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__module__}.{cls.__name__} is for CUDA, and stands in here for its name only")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {"__module__": f"{cls.__module__}.{cls.__name__}"})


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self._inside = f"{package}."

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        del path, target
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith(self._inside) else None

    def create_module(self, spec: Any) -> None:
        del spec

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []
        module.__getattr__ = name_of(module.__name__)  # type: ignore[method-assign]


def name_of(module: str) -> Any:
    """Return a module's `__getattr__`."""

    def absent(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {"__module__": module})

    return absent


def stand_in(package: str) -> Any:
    """Let any submodule of a package be imported; returns the package's own `__getattr__`."""
    sys.meta_path.append(_Submodules(package))
    return name_of(package)
