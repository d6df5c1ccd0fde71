"""`fp16-patch doctor`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from fp16_patch.cli.options import InputPath, print_text
from fp16_patch.cli.plan_of_command import plan_of


@click.command("doctor", context_settings={"allow_interspersed_args": False})
@click.option("--json", "as_json", is_flag=True, help="Print everything that was found as JSON.")
@click.option("--verbose", is_flag=True, help="List every patch, those that are not needed here as well.")
@click.option(
    "--source",
    metavar="FOLDER",
    type=InputPath(),
    help="Say which patches hold for this source tree, a fork for example, and nothing of this machine.",
)
@click.argument("training_command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND]")
def command(as_json: bool, verbose: bool, source: Path | None, training_command: tuple[str, ...]) -> None:
    """Check this machine and a training command; start nothing.

    Prints what does not fit with its fix, the dtype that each role will compute in, and the one it would compute in
    without fp16_patch. Exit code 0: fit, 1: not.

    \b
    Examples:
      fp16-patch doctor
      fp16-patch doctor -- python -m verl.trainer.main_ppo \\
          actor_rollout_ref.rollout.name=vllm algorithm.adv_estimator=grpo
      fp16-patch doctor --source ../our_verl
    """
    if source is not None:
        _check_source(source)
    from fp16_patch.cli.examination import print_examination
    from fp16_patch.doctor import examine

    examination = examine(plan_of(), training_command)
    if as_json:
        print_text(json.dumps(examination.as_dict(), indent=1))
    else:
        print_examination(examination, verbose)
    sys.exit(0 if examination.fit else 1)


def _check_source(path: Path) -> None:
    from fp16_patch.releases import matrix, tables
    from fp16_patch.untrusted.console import TextConsole

    verdicts = matrix.check_tree(path)
    tables.print_verdicts(str(path), verdicts, TextConsole())
    sys.exit(0 if matrix.covered(verdicts) else 1)
