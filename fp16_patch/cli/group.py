"""The group of commands: lists them in order of use, and ends an error that a user can mend in one line."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from fp16_patch.plan.errors import Fp16PatchError
from fp16_patch.untrusted.paths import reason_of
from fp16_patch.untrusted.text import printable_lines

_EXIT_CODES = {"probe": 2}
"""Of an error, where the command documents another than 1."""
# The extra that brings what a command needs beside our own dependencies.
_EXTRAS = {"report": "report", "analyze": "report", "watch": "report", "probe": "probe", "settings": "verl"}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Failure(click.ClickException):
    """An error in one line, with the exit code that the command documents for it."""

    def __init__(self, problem: object, exit_code: int = 1) -> None:
        super().__init__(str(problem))
        # click reads it from the instance, but declares it for the class alone.
        vars(self)["exit_code"] = exit_code


class Group(click.Group):
    """The commands, in the order they are declared in."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        with _shown_as_text():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        _encode_anything()
        with _shown_as_text(), _in_one_line(ctx):
            return super().invoke(ctx)


@contextmanager
def _shown_as_text() -> Iterator[None]:
    """Let what an error quotes, of the command line or of a file, reach the terminal as text."""
    try:
        yield
    except click.ClickException as problem:
        # click declares it for good.
        vars(problem)["message"] = printable_lines(problem.message)
        raise


@contextmanager
def _in_one_line(ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except Fp16PatchError as problem:
        raise Failure(problem, _exit_code(ctx)) from problem
    except ModuleNotFoundError as missing:
        if is_ours(missing):
            raise
        raise Failure(what_is_missing(missing, str(ctx.invoked_subcommand)), _exit_code(ctx)) from missing
    except OSError as problem:
        if problem.errno == errno.EPIPE:
            raise  # click ends it without a word: whoever was to read the output has left
        raise Failure(_sentence(problem), _exit_code(ctx)) from problem


def _exit_code(ctx: click.Context) -> int:
    return _EXIT_CODES.get(str(ctx.invoked_subcommand), 1)


def _sentence(problem: OSError) -> str:
    if problem.filename is not None:
        return f"{problem.filename}: {reason_of(problem)}"
    if problem.errno not in _FULL:
        return str(problem)
    # Commands say themselves which file is full. What standard output still holds goes nowhere at the end.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return f"standard output cannot be written: {reason_of(problem)}"


def _encode_anything() -> None:
    """Write an escape for what the terminal's encoding does not have, and for the odd bytes of a path."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # One that was opened on a file, and leads to a pipe by now, cannot be told.
        with suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")


def is_ours(missing: ModuleNotFoundError) -> bool:
    """Return whether the module is one of this package: its absence is a defect then, not a matter of installation."""
    return missing.name is None or missing.name.partition(".")[0] == "fp16_patch"


def what_is_missing(missing: ModuleNotFoundError, command: str) -> str:
    """Say which package a command wants, and the extra that brings it."""
    extra = _EXTRAS.get(command)
    package = f"'fp16-patch[{extra}]'" if extra else "fp16-patch"
    name = str(missing.name).partition(".")[0]
    return f"{command} needs {name}, which is not installed here. Fix: pip install {package}"
