"""A call's arguments by name, however they are given and whatever decorates the function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from fp16_patch.patching.call_arguments import argument, bound, takes


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hides the signature, as verl's `GPUMemoryLogger` does."""
    level = 1

    def log(*args: Any, **kwargs: Any) -> Any:
        return level and function(*args, **kwargs)

    return log


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(function)(logged(function))


class Worker:
    def plain(self, data: Any, entropy: bool = False) -> Any:
        return data, entropy

    hidden, named, twice = logged(plain), wrapped(plain), logged(logged(plain))


@pytest.mark.parametrize("method", ["plain", "hidden", "named", "twice"])
def test_an_argument_is_found_by_its_name_however_it_is_given(method: str) -> None:
    call = getattr(Worker(), method)
    assert argument(call, (1,), {}, "data") == argument(call, (), {"data": 1}, "data") == 1
    assert argument(call, (1, True), {}, "entropy") is True
    assert argument(call, (1,), {}, "entropy") is None
    assert takes(call, "entropy")
    assert not takes(call, "temperature")


@pytest.mark.parametrize("method", ["plain", "hidden", "named", "twice"])
def test_a_call_can_be_changed(method: str) -> None:
    changed = bound(getattr(Worker(), method), (1,), {"entropy": True})
    changed.arguments["data"] = 2
    assert getattr(Worker(), method)(*changed.args, **changed.kwargs) == (2, True)


def test_a_function_is_seen_through_its_decorator_too() -> None:
    assert argument(logged(lambda data: data), (1,), {}, "data") == 1


def test_what_takes_anything_has_no_names() -> None:
    def anything(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    assert argument(anything, (1,), {"data": 2}, "data") is None
    assert not takes(anything, "data")
