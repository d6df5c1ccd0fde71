"""Reads the source of a framework's modules without importing it: of what is installed, or of a source tree.

A wheel is one too, see `releases.wheels`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from fp16_patch.plan.errors import SourceError


class Sources(Protocol):
    """Holds Python modules."""

    def read(self, module: str) -> str | None:
        """Return the source of a module, by its dotted name; None if it is not there."""


class Installed:
    """Holds what this Python would import."""

    def read(self, module: str) -> str | None:
        path = installed_file(module)
        return None if path is None else path.read_text(encoding="utf-8")


class Tree:
    """Is a checkout: packages lie in it, or in its `src`.

    Raises:
        SourceError: there is no such directory.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise SourceError(f"{path}: no such directory. Fix: name the directory that holds the framework's package")
        self._roots = (path, path / "src")

    def read(self, module: str) -> str | None:
        path = self.file(module)
        return None if path is None else path.read_text(encoding="utf-8")

    def file(self, module: str) -> Path | None:
        """Find where the source of a module lies; None if it is not there."""
        return _first_file(self._roots, module.split("."))


def installed_file(module: str) -> Path | None:
    """Find where the installed source of `module` lies, without importing it; None when it is not installed."""
    package, *rest = module.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return _first_file([Path(root) for root in spec.submodule_search_locations], rest)


def _first_file(roots: list[Path] | tuple[Path, ...], parts: list[str]) -> Path | None:
    candidates = (root / name for root in roots for name in file_names(parts))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def file_names(parts: list[str]) -> tuple[str, str]:
    """Name the files that a module of these parts may be."""
    stem = "/".join(parts)
    return f"{stem}.py", f"{stem}/__init__.py".lstrip("/")
