"""Tells whether a trainer of somebody's own goes through what checks every process before an update."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import MODE_ENV

_UPDATE = "_update_actor"
_LOOPS = ("fit", "step", "fit_step", "_step_once", "_fit_update_actor")
# How a worker group is asked for it, past the trainer's own method.
_PAST_IT = "_wg.update_actor("


def unknown_trainer(trainer: type) -> Conflict | None:
    """Say why a subclass of verl's trainer is refused; None if every update of its goes through `_update_actor`.

    Releases before 0.7.0 have no such method: there the workers' own calls are wrapped.
    """
    if not hasattr(trainer, _UPDATE):
        return None
    if (method := next(_past_the_check(trainer), None)) is None:
        return None
    name = f"{trainer.__module__}.{trainer.__qualname__}"
    reason = f"its {method} has the actor updated past {_UPDATE}, so that nothing checks the other processes before"
    fix = f"call {_UPDATE} of verl's trainer there, or {MODE_ENV}=observe to measure without changing"
    return Conflict("trainer", name, reason, fix)


def _past_the_check(trainer: type) -> Iterator[str]:
    """Yield the methods, of classes that are not verl's, which update without it."""
    for owner in trainer.__mro__:
        if owner.__module__.split(".")[0] in ("verl", "abc", "builtins"):
            continue
        for method in (*_LOOPS, _UPDATE):
            if method in vars(owner) and _PAST_IT in _source_of(vars(owner)[method]):
                yield method


def _source_of(method: object) -> str:
    """Return its source; empty where there is none to read."""
    try:
        return inspect.getsource(method)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
