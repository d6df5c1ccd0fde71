"""The group of commands: lists them in order of use, and ends an error that a user can mend in one line."""

from __future__ import annotations

from typing import Any

import click

from fp16_patch.plan.errors import Fp16PatchError

# The extra that brings what a command needs beside our own dependencies.
_EXTRAS = {"report": "report", "analyze": "report", "watch": "report", "probe": "probe", "settings": "verl"}


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

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Fp16PatchError as problem:
            raise Failure(problem) from problem
        except ModuleNotFoundError as missing:
            if is_ours(missing):
                raise
            raise Failure(what_is_missing(missing, str(ctx.invoked_subcommand))) from missing


def is_ours(missing: ModuleNotFoundError) -> bool:
    """Return whether the module is one of this package: its absence is a defect then, not a matter of installation."""
    return missing.name is None or missing.name.partition(".")[0] == "fp16_patch"


def what_is_missing(missing: ModuleNotFoundError, command: str) -> str:
    """Say which package a command wants, and the extra that brings it."""
    extra = _EXTRAS.get(command)
    package = f"'fp16-patch[{extra}]'" if extra else "fp16-patch"
    name = str(missing.name).partition(".")[0]
    return f"{command} needs {name}, which is not installed here. Fix: pip install {package}"
