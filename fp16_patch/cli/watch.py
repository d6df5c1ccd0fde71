"""`fp16-patch watch`."""

from __future__ import annotations

from pathlib import Path

import click

from fp16_patch.cli.group import Failure
from fp16_patch.cli.options import InputPath, Seconds
from fp16_patch.untrusted.paths import is_folder


@click.command("watch")
@click.argument("run", required=False, type=InputPath())
@click.option("--address", default="auto", show_default=True, help="Ray cluster to ask, where no RUN is given.")
@click.option("--every", type=Seconds(0.1, 3600), default=2.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print what there is now and leave; exit code 1 if there is nothing.")
def command(run: Path | None, address: str, every: float, once: bool) -> None:
    """Show what runs measure while they train, in this terminal.

    Ctrl-C leaves, the run goes on. With RUN, a run's output directory, its record is followed; one that has not started
    is waited for. Without, all runs in the Ray cluster are asked.

    \b
    Examples:
      fp16-patch watch
      fp16-patch watch checkpoints/my_project/my_run
      fp16-patch watch --address 10.0.0.1:6379 --once
    """
    from fp16_patch.mismatch.report import live
    from fp16_patch.mismatch.report.follow import Cluster, RecordFiles
    from fp16_patch.untrusted.console import TextConsole

    try:
        source = RecordFiles(_place(run, once)) if run else Cluster(address)
        seen = live.watch(source.poll, TextConsole(), once, every)
    except FileNotFoundError as problem:
        raise Failure(problem) from problem
    if once and not seen:
        raise click.exceptions.Exit(1)


def _place(run: Path, once: bool) -> Path:
    from fp16_patch.mismatch.record.reading import record_folder

    try:
        return record_folder(run)
    except FileNotFoundError:
        if once and is_folder(run):
            raise
        return run
