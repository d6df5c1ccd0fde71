"""`fp16-patch diff`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fp16_patch.cli.options import FormerlyOption, InputPath, OutputFile, one_mode, print_text, writing
from fp16_patch.cli.plan_of_command import plan_of


@click.command("diff")
@click.option(
    "--source",
    required=True,
    metavar="FOLDER",
    type=InputPath(),
    help="The source tree, which itself is left alone.",
)
@click.option(
    "--mode",
    metavar="MODE",
    cls=FormerlyOption,
    formerly=["--dtype"],
    callback=one_mode,
    help="What every role is to compute in: fp16, bf16 or fp32 [default: FP16_PATCH, else fp16].",
)
@click.option("--output", type=OutputFile(), help="Write the diff here [default: standard output].")
def command(source: Path, mode: str | None, output: Path | None) -> None:
    """Write the patches as a diff of a source tree, such as a fork's.

    The edited tree computes as it does under the plan, without fp16_patch. Standard error says
    what becomes of each patch, and what is lost: checks, refusals, measurements. Settings are those of the environment
    (FP16_PATCH_INIT_SCALE=1024). Exit code 0: all is known, 1: there is code without an edit, and roles may disagree.

    \b
    Examples:
      fp16-patch diff --source ../our_verl | patch -p1 -d ../our_verl
      fp16-patch diff --source ../our_verl --mode bf16 --output bf16.diff
    """
    from fp16_patch.releases import tables, tree_diff
    from fp16_patch.untrusted.console import TextConsole

    plan = plan_of(mode)
    if not plan.overrides_dtype:
        raise click.UsageError(f"FP16_PATCH={plan.mode} decides no dtype to write. Fix: give --mode fp16")
    text, outcomes = tree_diff.diff_of(source, plan)
    if output is None:
        print_text(tree_diff.as_bytes(text))
    else:
        with writing(output):
            tree_diff.write(text, output)
    tables.print_outcomes(str(source), outcomes, TextConsole(stderr=True))
    sys.exit(0 if tree_diff.complete(outcomes) else 1)
