"""`fp16-patch settings`."""

from __future__ import annotations

import json

import click

from fp16_patch.cli.options import print_text
from fp16_patch.cli.plan_of_command import plan_and_origins


@click.command("settings", context_settings={"allow_interspersed_args": False})
@click.option("--mode", default=None, metavar="MODE", help="As for `run`: fp16, bf16, fp32, observe or off.")
@click.option("--verbose", is_flag=True, help="Say what each setting means, what it may be and where it applies.")
@click.option("--json", "as_json", is_flag=True, help="Print all of that as JSON.")
@click.argument("training_command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND]")
def command(mode: str | None, verbose: bool, as_json: bool, training_command: tuple[str, ...]) -> None:
    """Print every setting, its value and where that came from.

    A value comes from its default, an environment variable (FP16_PATCH_INIT_SCALE), the result of a probe
    (FP16_PATCH_PROBE), or verl's configuration: put the training command behind `--` to have that read, too.

    \b
    Examples:
      fp16-patch settings
      FP16_PATCH_INIT_SCALE=1024 fp16-patch settings --verbose
      fp16-patch settings -- python -m verl.trainer.main_ppo \\
          +fp16_patch.init_scale=1024
    """
    from fp16_patch.plan.in_force import settings_in_force
    from fp16_patch.plan.plan import resolve

    plan, origins = plan_and_origins(mode)
    if training_command:
        from fp16_patch.doctor import configured_settings

        plan, configured = resolve(*configured_settings(training_command), plan)
        origins = {**origins, **configured}
    settings = settings_in_force(plan, origins)
    if as_json:
        print_text(json.dumps({each.setting.name: each.as_dict() for each in settings}, indent=1))
        return
    from fp16_patch.cli.settings_table import print_meanings, print_settings
    from fp16_patch.untrusted.console import TextConsole

    show = print_meanings if verbose else print_settings
    show(settings, TextConsole())
