"""`fp16-patch`: what a person types. A file a command; what is decided and drawn lies in the rooms below."""

from __future__ import annotations

import click

from fp16_patch import __version__
from fp16_patch.cli import analyze, demo, diff, doctor, matrix, probe, report, run, settings, watch
from fp16_patch.cli.group import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fp16-patch")
def main() -> None:
    """Train with verl or OpenRLHF in FP16 everywhere, proved in every process, and measure the mismatch.

    \b
    A first run:
      fp16-patch doctor -- python -m verl.trainer.main_ppo …
      fp16-patch run -- python -m verl.trainer.main_ppo …
      fp16-patch report checkpoints/my_project/my_run
    """


for _module in (doctor, run, settings, watch, report, analyze, probe, matrix, diff, demo):
    main.add_command(_module.command)
