"""`fp16-patch demo`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from fp16_patch.cli.group import Failure


@click.command("demo")
def command() -> None:
    """Train a tiny model on the CPU in three precisions.

    Real verl, Ray and vLLM, set side by side at the end. Needs a checkout of fp16_patch; takes minutes.

    \b
    Example:
      fp16-patch demo
    """
    makefile = Path(__file__).parents[2] / "Makefile"
    if not makefile.is_file():
        raise Failure("the demo is in the source checkout, not in the installed package: clone it, `make demo`")
    os.execvp("make", ["make", "-C", str(makefile.parent), "demo"])
