"""A call's arguments by the names of their parameters: positions differ between releases."""

from __future__ import annotations

import inspect
from typing import Any


def argument(wrapped: Any, args: Any, kwargs: Any, name: str) -> Any:
    """The value that a call gives a parameter, None where it leaves it out."""
    return bound(wrapped, args, kwargs).arguments.get(name)


def bound(wrapped: Any, args: Any, kwargs: Any) -> inspect.BoundArguments:
    """A call's arguments, to look at or to change."""
    return inspect.signature(wrapped).bind(*args, **kwargs)


def takes(wrapped: Any, name: str) -> bool:
    """Whether it has such a parameter."""
    return name in inspect.signature(wrapped).parameters
