"""Judges the arguments of an engine's command line that a run passes through, past the framework's own settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fp16_patch.plan.dtypes import FLOAT32, spelling_of
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import Plan

# Takes an argument's value; returns why it spoils the plan, None if it does not.
Judge = Callable[[Any, Plan], str | None]


def overridden(value: object, plan: Plan) -> str | None:
    """Judge a dtype: it goes before the framework's own."""
    return (
        None if value is None or str(value) in spelling_of(plan.dtype).all else f"it overrides the plan's {plan.dtype}"
    )


def overridden_unless_auto(value: object, plan: Plan) -> str | None:
    """Judge a dtype that follows the weights' where it is `auto`."""
    return None if str(value) == "auto" else overridden(value, plan)


def overridden_downwards(value: object, plan: Plan) -> str | None:
    """Judge the dtype of a state that may be held in float32, besides following the weights'."""
    return None if str(value) in FLOAT32.all else overridden_unless_auto(value, plan)


def quantized(value: object, plan: Plan) -> str | None:
    """Judge a way of quantizing, which any is."""
    return f"a quantized sampler is not {plan.dtype}" if value else None


def spoilt(key: str, arguments: Mapping[str, Any], judges: Mapping[str, Judge], plan: Plan) -> Iterator[Conflict]:
    """Yield the arguments that spoil the plan, as they are spelled; a command line takes hyphens and underscores.

    Args:
        key: the setting that holds them.
        judges: argument, with underscores → who judges it.
    """
    for argument, value in arguments.items():
        judge = judges.get(spelled(argument))
        if judge is not None and (reason := judge(value, plan)):
            yield Conflict(f"{key}.{argument}", value, reason, "remove it")


def spelled(argument: str) -> str:
    """Return the name of an argument with underscores."""
    return argument.replace("-", "_")
