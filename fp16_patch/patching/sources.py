"""Reads the source of a framework's modules without importing it: of what is installed, or of a source tree.

A wheel is one too, see `releases.wheels`.
"""

from __future__ import annotations

import errno
import io
import stat
import tokenize
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from fp16_patch.patching.fingerprint import parsed
from fp16_patch.plan.errors import SourceError
from fp16_patch.untrusted.paths import is_folder, reason_of
from fp16_patch.untrusted.reading import Unreadable, read_bytes

MAX_SOURCE_BYTES = 16 * 2**20
"""Of one module; the largest of the frameworks' are below 1 MB."""


class Sources(Protocol):
    """Holds Python modules."""

    def read(self, module: str) -> str | None:
        """Return the source of a module, by its dotted name; None if it is not there.

        Raises:
            SourceError: it cannot be read as Python.
        """


class Source(NamedTuple):
    """A module's text, its line ends as they are, and the encoding that Python reads it in (PEP 263)."""

    text: str
    encoding: str

    @classmethod
    def of(cls, content: bytes, name: object) -> Source:
        """Decode a module by its byte order mark, or by the encoding that it declares.

        Args:
            name: of the file, for the message of an error.

        Raises:
            SourceError: it is in another encoding.
        """
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            return cls(content.decode(encoding), encoding)
        except (SyntaxError, ValueError) as problem:
            raise SourceError(f"{name}: not read as Python: {problem}. {_MEND}") from problem

    @property
    def lines(self) -> str:
        """The text with one kind of line end."""
        return self.text.replace("\r\n", "\n").replace("\r", "\n")

    def python(self, name: object) -> str:
        """The same, of a text that Python can compile.

        Raises:
            SourceError: it is none.
        """
        try:
            parsed(self.lines, "")  # what is parsed here is not parsed again
        except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
            reason = "it is nested too deeply" if isinstance(problem, RecursionError | MemoryError) else problem
            raise SourceError(f"{name}: not read as Python: {reason}. {_MEND}") from problem
        return self.lines


_MEND = "Fix: give a tree that Python can import, or mend the file"


def source_of(file: Path) -> Source:
    """Read a Python file as Python does.

    Raises:
        SourceError: it cannot be read, is larger than `MAX_SOURCE_BYTES`, or not in its encoding.
    """
    try:
        return Source.of(read_bytes(file, MAX_SOURCE_BYTES), file)
    except (OSError, Unreadable) as problem:
        raise SourceError(f"{file}: {reason_of(problem)}. {_MEND}") from problem


class Installed:
    """Holds what this Python would import."""

    def read(self, module: str) -> str | None:
        path = installed_file(module)
        return None if path is None else source_of(path).lines


class Tree:
    """Is a checkout: packages lie in it, or in its `src`.

    Raises:
        SourceError: there is no such directory.
    """

    def __init__(self, path: Path) -> None:
        if not is_folder(path):
            raise SourceError(f"{path}: no such directory. Fix: name the directory that holds the framework's package")
        self._roots = (path, path / "src")

    def read(self, module: str) -> str | None:
        path = self.file(module)
        return None if path is None else source_of(path).python(path)

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
    return next(filter(_is_module, candidates), None)


def _is_module(file: Path) -> bool:
    """Return whether Python would import a file; of one that nobody can look at, it would say why not.

    Raises:
        SourceError: the links to it run in a circle, or a folder above it is closed.
    """
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as problem:
        if problem.errno == errno.ENAMETOOLONG:
            return False
        raise SourceError(f"{file}: {reason_of(problem)}. {_MEND}") from problem


def file_names(parts: list[str]) -> tuple[str, str]:
    """Name the files that a module of these parts may be."""
    stem = "/".join(parts)
    return f"{stem}.py", f"{stem}/__init__.py".lstrip("/")
