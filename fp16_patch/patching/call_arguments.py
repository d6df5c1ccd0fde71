"""A call's arguments by the names of their parameters: positions differ between releases."""

from __future__ import annotations

import inspect
from typing import Any


def argument(wrapped: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Return the value that a call gives a parameter, None where it leaves it out."""
    return bound(wrapped, args, kwargs).arguments.get(name)


def bound(wrapped: Any, args: Any, kwargs: Any) -> inspect.BoundArguments:
    """Return a call's arguments, to look at or to change."""
    return _signature(wrapped).bind(*args, **kwargs)


def takes(wrapped: Any, name: str) -> bool:
    """Return whether it has such a parameter."""
    return name in _signature(wrapped).parameters


def _signature(wrapped: Any) -> inspect.Signature:
    """Return the signature of a function, also where a decorator hides it, as verl's `GPUMemoryLogger` does.

    Such a decorator lacks `functools.wraps`: what it returns takes anything, and holds the function in its closure.
    """
    signature = inspect.signature(wrapped)
    if [parameter.kind for parameter in signature.parameters.values()] != [
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    ]:
        return signature
    cells = getattr(getattr(wrapped, "__func__", wrapped), "__closure__", None) or ()
    hidden = [cell.cell_contents for cell in cells if inspect.isfunction(cell.cell_contents)]
    if len(hidden) != 1:
        return signature
    owner = getattr(wrapped, "__self__", None)
    return _signature(hidden[0] if owner is None else hidden[0].__get__(owner))
