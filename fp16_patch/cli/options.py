"""Options that several commands have, each spelled in one way."""

from __future__ import annotations

import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import click

from fp16_patch.cli.group import Failure
from fp16_patch.untrusted.paths import is_folder, problem_of, reason_of

Fail = Callable[[str], object]


class FormerlyOption(click.Option):
    """An option that also answers to the names it had in earlier releases; the help leaves those out."""

    def __init__(self, *arguments: Any, formerly: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._formerly = [*formerly]

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown, self.opts = self.opts, [*self.opts, *self._formerly]
        super().add_to_parser(parser, ctx)
        self.opts = shown


class InputPath(click.Path):
    """A file or a folder to be read; what is no path at all is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        problem = problem_of(value)
        if problem is not None:
            self.fail(f"{value}: {problem}", param, ctx)
        return super().convert(value, param, ctx)


class OutputFile(InputPath):
    """A file to be written: that it can be is tried before any work is done."""

    def __init__(self, allow_dash: bool = False) -> None:
        super().__init__()
        self.allow_dash = allow_dash

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        def fail(problem: str) -> None:
            self.fail(problem, param, ctx)

        path = super().convert(value, param, ctx)
        if self.allow_dash and str(path) == "-":
            if sys.stdout is None:
                fail("standard output is closed. Fix: name a file")
        else:
            check_file(path, fail)
        return path


class Seconds(click.FloatRange):
    """A time between two looks."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is no number", param, ctx)
        return seconds


def check_file(path: Path, fail: Fail) -> None:
    """Call `fail` with the reason if a file cannot be written; what is there stays as it is."""
    if not is_folder(path.parent):
        fail(f"there is no folder {path.parent}. Fix: mkdir -p {path.parent}")
    elif is_folder(path):
        fail(f"{path} is a folder. Fix: name a file in it")
    else:
        _try(_open_and_leave, path, fail)


def check_folder(folder: Path, fail: Fail) -> None:
    """Call `fail` with the reason if no files can be written to a folder, which need not be there yet."""
    _try(_make_and_leave, folder, fail)


def _try(attempt: Callable[[Path], None], path: Path, fail: Fail) -> None:
    try:
        attempt(path)
    except OSError as problem:
        fail(f"{path} cannot be written: {reason_of(problem)}. Fix: name a place where you may write")


def _open_and_leave(path: Path) -> None:
    place = Path(os.path.realpath(path))
    try:
        # Not truncated; and a pipe, whose reader would take the end of this for the end of all, is not opened.
        if stat.S_ISREG(place.stat().st_mode):
            os.close(os.open(place, os.O_WRONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        place.unlink()


def _make_and_leave(folder: Path) -> None:
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    made: list[Path] = []
    try:
        for place in reversed(absent):
            place.mkdir()
            made.append(place)
        _open_and_leave(folder / f".{uuid4().hex}")
    finally:
        for place in reversed(made):
            place.rmdir()


@contextmanager
def writing(path: Path, exit_code: int = 1) -> Iterator[None]:
    """Say in one sentence that an output could not be written after all: the disk may be full by now.

    Raises:
        Failure: with the path and the reason.
    """
    try:
        yield
    except OSError as problem:
        reason = f"{path} was not written, or not whole: {reason_of(problem)}. Fix: name another place"
        raise Failure(reason, exit_code) from problem


def print_text(text: str | bytes) -> None:
    """Print what the command was asked for, as it is.

    Raises:
        Failure: standard output is closed.
    """
    if sys.stdout is None:
        raise Failure("standard output is closed: nobody would read the result. Fix: send it to a file, `> FILE`")
    click.echo(text, nl=isinstance(text, str))


def one_mode(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Read a mode that decides a dtype, by any of its names."""
    from fp16_patch.plan.settings import DTYPE_OF_MODE, SETTINGS

    if value is None:
        return None
    mode: str = SETTINGS["mode"].parse(value)
    if DTYPE_OF_MODE.get(mode) is None:
        modes = ", ".join(mode for mode, dtype in DTYPE_OF_MODE.items() if dtype)
        raise click.BadParameter(f"{value!r} is none of {modes}", ctx, param)
    return mode


def several_modes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Read modes with a comma between them, by any of their names; what is no mode is left for the probe to refuse."""
    from fp16_patch.plan.settings import SETTINGS

    return tuple(SETTINGS["mode"].parse(word) for word in value.split(",") if word.strip())
