"""Looks where a path that anybody may have written leads to: no path raises, however long or odd."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NOWHERE = (errno.ENAMETOOLONG, errno.ELOOP)


def is_file(path: str | Path) -> bool:
    """Return whether a regular file lies there; False too of what is no path, and where nobody may look."""
    # Unlike pathlib's, this one answers for names that are too long, for NUL in one, and for folders that are closed.
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Return whether a folder lies there, in the same way."""
    return os.path.isdir(path)  # noqa: PTH112


def from_home(path: str | Path) -> Path:
    """Return a path with `~` as the home that it stands for, and as it is where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def problem_of(path: str | Path) -> str | None:
    """Say why nothing can lie at a path; None if something could."""
    try:
        Path(path).stat()
    except OSError as problem:
        return reason_of(problem) if problem.errno in _NOWHERE else None
    except ValueError:
        return no_path(path)
    return None


def no_path(path: str | Path) -> str:
    """Say why Python raises `ValueError` for a path: it cannot be given to the system."""
    held = "NUL character" if "\0" in str(path) else "half of a surrogate pair"
    return f"a path holds no {held}"


def reason_of(problem: OSError | ValueError) -> str:
    """Say without the path why a file cannot be had: in the system's words, or in those of `Unreadable`."""
    if isinstance(problem, OSError):
        return (problem.strerror or type(problem).__name__).lower()
    return str(problem)
