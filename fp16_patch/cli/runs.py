"""Runs as they are typed: found, labelled, and shown side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fp16_patch.cli.group import Failure

if TYPE_CHECKING:
    from fp16_patch.mismatch.record.reading import RunRecord


def require_folders(paths: Sequence[Path]) -> None:
    """Stop at once if one of them is not there.

    Raises:
        Failure: with the path.
    """
    for path in paths:
        if not path.is_dir():
            raise Failure(f"{path}: no such directory. Give the output directory of a run")


def record_at(path: Path) -> Path:
    """Return the directory of a run's record: `path`, `fp16_patch` in it, or the only one that lies one level down.

    Raises:
        Failure: there is no record, or more than one.
    """
    from fp16_patch.mismatch.record.reading import RECORD_FILES, RECORD_FOLDER

    def holds_record(folder: Path) -> bool:
        return any((place / name).is_file() for place in (folder, folder / RECORD_FOLDER) for name in RECORD_FILES)

    if holds_record(path):
        return path
    below = sorted(folder for folder in path.iterdir() if holds_record(folder)) if path.is_dir() else []
    if len(below) == 1:
        return below[0]
    if below:
        raise Failure(f"{path} holds several runs: {', '.join(map(str, below))}. Fix: name those you mean")
    where = f"{path}, {path / RECORD_FOLDER} and the folders in {path}"
    raise Failure(
        f"no run record: looked for {', '.join(RECORD_FILES)} in {where}. "
        "Fix: give the output directory of a run that had fp16_patch active"
    )


def labelled(paths: Sequence[Path]) -> dict[str, Path]:
    """Label each run by its folder's name or, where names repeat, by its path from where the paths part."""
    names = [path.resolve().name for path in paths]
    common = os.path.commonpath([path.resolve() for path in paths]) if len(set(paths)) > 1 else Path.cwd()
    return {
        os.path.relpath(path.resolve(), common) if names.count(name) > 1 else name: path
        for name, path in zip(names, paths, strict=True)
    }


def require_page_writer() -> None:
    """Import what the page needs, so that what is missing is said before the runs are read."""
    import fp16_patch.mismatch.report.page  # noqa: F401


def show(records: Mapping[str, RunRecord], html: Path | None, tokenizer: Path | None, quiet: bool = False) -> None:
    """Print the runs side by side with a diagnosis of each, unless `quiet`, and write the page if `html` is given."""
    from rich.console import Console

    if not quiet:
        from fp16_patch.mismatch.report.comparison import print_comparison, print_diagnosis

        console = Console()
        print_comparison(records, console)
        print_diagnosis(records, console)
    if html is not None:
        from fp16_patch.mismatch.report.page import write_html

        write_html(records, html, "sampler against learner", tokenizer)
        click.echo(f"page: {html}", err=quiet)
