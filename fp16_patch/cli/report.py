"""`fp16-patch report`."""

from __future__ import annotations

from pathlib import Path

import click

from fp16_patch.cli.group import Failure
from fp16_patch.cli.options import InputPath, OutputFile, check_file
from fp16_patch.cli.runs import require_folders, require_for_page, show


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=InputPath(), metavar="RUN...")
@click.option("--html", type=OutputFile(), help="Write the page here [default: report.html in the first RUN].")
@click.option(
    "--tokenizer",
    metavar="FOLDER",
    type=InputPath(),
    help="Name the worst tokens by this tokenizer [default: the plan's model, if it is on this machine].",
)
@click.pass_context
def command(ctx: click.Context, runs: tuple[Path, ...], html: Path | None, tokenizer: Path | None) -> None:
    """Show what runs measured: table, diagnosis, page of plots.

    The table and the diagnosis are printed, the page is one self-contained file. RUN is a run's output directory, or
    the fp16_patch directory in it. Several are set side by side; the first is what the others are compared with.

    \b
    Examples:
      fp16-patch report checkpoints/my_project/my_run
      fp16-patch report bf16_run fp16_run --html compare.html
    """
    require_folders(runs)
    page = html or runs[0] / "report.html"
    check_file(page, lambda problem: ctx.fail(problem if html else f"{problem}, as --html FILE"))
    from fp16_patch.mismatch.record.reading import load_run
    from fp16_patch.mismatch.report.labels import labelled

    require_for_page(html, tokenizer)
    try:
        records = {label: load_run(path) for label, path in labelled(runs).items()}
    except FileNotFoundError as missing:
        raise Failure(missing) from missing
    show(records, page, tokenizer)
