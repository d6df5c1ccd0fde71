"""Runs as they are typed, shown side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fp16_patch.cli.group import Failure
from fp16_patch.cli.options import writing
from fp16_patch.untrusted.paths import is_folder
from fp16_patch.untrusted.text import printable

if TYPE_CHECKING:
    from fp16_patch.mismatch.record.reading import RunRecord


def require_folders(paths: Sequence[Path]) -> None:
    """Stop at once if one of them is not there.

    Raises:
        Failure: with the path.
    """
    for path in paths:
        if not is_folder(path):
            raise Failure(f"{path}: no such directory. Give the output directory of a run")


def require_for_page(html: Path | None, tokenizer: Path | None) -> None:
    """Check, before any work, that a page that was asked for can be written.

    Raises:
        Fp16PatchError: jinja2, plotly or the tokenizer is missing.
    """
    from fp16_patch.mismatch.report.decoding import tokenizer_of
    from fp16_patch.mismatch.report.rendering import require_report_extra

    if html is not None:
        require_report_extra()
    if tokenizer is not None:
        tokenizer_of(tokenizer)


def show(records: Mapping[str, RunRecord], html: Path | None, tokenizer: Path | None, quiet: bool = False) -> None:
    """Print the runs side by side with a diagnosis of each, unless `quiet`, and write the page if `html` is given."""
    if not quiet:
        from fp16_patch.mismatch.report.comparison import print_comparison, print_diagnosis
        from fp16_patch.untrusted.console import TextConsole

        console = TextConsole()
        print_comparison(records, console)
        print_diagnosis(records, console)
    if html is not None:
        from fp16_patch.mismatch.report.page import write_html
        from fp16_patch.mismatch.report.rendering import ReportExtraMissing

        try:
            with writing(html):
                write_html(records, html, "Sampler against learner", tokenizer)
            click.echo(f"page: {printable(html)}", err=quiet)
        except ReportExtraMissing as missing:
            click.echo(f"no page was written: {missing}", err=True)
