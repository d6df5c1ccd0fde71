"""Spelled-out dtypes in the code of functions of every kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import wrapt

from fp16_patch.patching.code_object_patch import edit
from fp16_patch.plan.errors import PatchError

torch = SimpleNamespace(bfloat16="torch.bfloat16", float16="torch.float16", float32="torch.float32")


class Tensor:
    def bfloat16(self) -> str:
        return "bf16"

    def half(self) -> str:
        return "fp16"


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


def plain() -> Any:
    return torch.bfloat16


@decorated
def nested() -> Any:
    return [(lambda each: (each, torch.bfloat16))(1)]


class Holder:
    dtype = "bfloat16"

    def method(self, default: str = "x") -> Any:
        return default, torch.bfloat16, {"bf16": "bf16"}.get("bf16")

    @classmethod
    def of_class(cls) -> Any:
        return cls.dtype, torch.bfloat16

    @staticmethod
    def static() -> Any:
        return Tensor().bfloat16()

    def generator(self) -> Any:
        with_closure = self.dtype
        yield from ((with_closure, torch.bfloat16) for _ in range(1))


@pytest.mark.parametrize(
    ("symbol", "call", "spellings", "edited"),
    [
        (plain, plain, ["torch.bfloat16"], "torch.float16"),
        (nested, nested, ["torch.bfloat16"], [(1, "torch.float16")]),
        (Holder.method, Holder().method, ["torch.bfloat16", '"bf16"'], ("x", "torch.float16", "fp16")),
        (vars(Holder)["of_class"], Holder.of_class, ["torch.bfloat16"], ("bfloat16", "torch.float16")),
        (vars(Holder)["static"], Holder.static, [".bfloat16()"], "fp16"),
        (Holder.generator, lambda: list(Holder().generator()), ["torch.bfloat16"], [("bfloat16", "torch.float16")]),
    ],
)
def test_a_function_of_any_kind_is_edited_and_restored(
    symbol: Any, call: Callable[[], Any], spellings: list[str], edited: Any
) -> None:
    before = call()
    restore = edit(symbol, tuple(spellings), "float16")
    assert call() == edited != before
    restore()
    assert call() == before


def test_a_wrapped_function_is_edited_inside_its_wrapper() -> None:
    wrapper = wrapt.FunctionWrapper(plain, lambda wrapped, instance, args, kwargs: ("wrapped", wrapped()))
    restore = edit(wrapper, ("torch.bfloat16",), "float32")
    assert wrapper() == ("wrapped", "torch.float32")
    restore()
    assert wrapper() == ("wrapped", "torch.bfloat16")


@pytest.mark.parametrize("spelling", ['"bfloat16"', ".bfloat16()"])
def test_a_spelling_that_is_not_there_is_an_error(spelling: str) -> None:
    def without() -> Any:
        return torch.float32

    with pytest.raises(PatchError, match="without does not spell"):
        edit(without, (spelling,), "float16")


def test_what_is_no_function_cannot_be_edited() -> None:
    with pytest.raises(PatchError, match="no Python function"):
        edit(len, ("torch.bfloat16",), "float16")
