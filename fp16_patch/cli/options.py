"""Options that several commands have, each spelled in one way."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click


class FormerlyOption(click.Option):
    """An option that also answers to the names it had in earlier releases; the help leaves those out."""

    def __init__(self, *arguments: Any, formerly: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._formerly = [*formerly]

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown, self.opts = self.opts, [*self.opts, *self._formerly]
        super().add_to_parser(parser, ctx)
        self.opts = shown


class OutputFile(click.Path):
    """A file to be written: its folder has to be there before any work is done."""

    def __init__(self, allow_dash: bool = False) -> None:
        super().__init__(dir_okay=False, writable=True, allow_dash=allow_dash, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not (self.allow_dash and str(path) == "-"):
            check_folder(path.parent, lambda problem: self.fail(problem, param, ctx))
        return path


def check_folder(folder: Path, fail: Callable[[str], object]) -> None:
    """Call `fail` with the reason if no file can be written to `folder`."""
    if not folder.is_dir():
        fail(f"there is no folder {folder}. Fix: mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        fail(f"the folder {folder} is not writable")


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
