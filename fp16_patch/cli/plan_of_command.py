"""The plan of a command: what `--mode` says, over the environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fp16_patch.plan.plan import Origins, Plan

DEFAULT_MODE = "fp16"


def plan_of(mode: str | None = None) -> Plan:
    """Return the plan that the environment describes, FP16 where it names none, with `mode` over it.

    Raises:
        PlanError: a setting is unknown or wrong.
    """
    return plan_and_origins(mode)[0]


def plan_and_origins(mode: str | None = None) -> tuple[Plan, Origins]:
    """Return the same with where each value came from, and warn of variables that look like settings and are not."""
    from fp16_patch.plan.in_force import misspelled_variables
    from fp16_patch.plan.plan import COMMAND_LINE, MODE_ENV, PLAN_ENV, Plan, resolve, resolve_environment

    for given, meant in misspelled_variables(os.environ):
        click.echo(f"warning: {given} is not read. Did you mean {meant}?", err=True)
    if mode is None:
        return resolve_environment(os.environ, DEFAULT_MODE)
    asked = {"mode": Plan.from_settings({"mode": mode}, COMMAND_LINE).mode}
    # A plan that was carried here takes the variable for a word against it; what is typed goes over both.
    words = {} if PLAN_ENV in os.environ else {MODE_ENV: asked["mode"]}
    plan, origins = resolve_environment({**os.environ, **words}, DEFAULT_MODE)
    plan, typed = resolve(asked, COMMAND_LINE, plan)
    return plan, {**origins, **typed}
