"""Replaces a dtype that a framework's function spells out by the plan's, in the function's own code.

For functions that are right but for a `torch.bfloat16` in their middle, where no wrapper reaches. Only names and
constants of the compiled code are exchanged, so decorators, bound references and signatures stay what they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from fp16_patch.plan.dtypes import BFLOAT16, spelling_of, torch_name
from fp16_patch.plan.errors import PatchError

# Spelling in a declaration → table of the code object, what stands there, and what is to stand there for a dtype.
SPELLINGS: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "torch.bfloat16": ("co_names", BFLOAT16.torch, torch_name),
    ".bfloat16()": ("co_names", BFLOAT16.method, lambda dtype: spelling_of(dtype).method),
    '"bf16"': ("co_consts", BFLOAT16.short, lambda dtype: spelling_of(dtype).short),
    '"bfloat16"': ("co_consts", BFLOAT16.torch, torch_name),
}


def edit(symbol: Any, spellings: tuple[str, ...], dtype: str) -> Callable[[], None]:
    """Exchange each spelling in the code of a function, however it is decorated, and of the functions inside it.

    Args:
        symbol: a function, a method of any kind, or what a decorator made of one.
        spellings: keys of `SPELLINGS`.
        dtype: torch's name of the dtype that is to stand there.

    Returns:
        What puts the former code back.

    Raises:
        PatchError: a spelling does not occur, or the symbol is no Python function.
    """
    function = function_of(symbol)
    former = code = function.__code__
    for spelling in spellings:
        table, old, new = SPELLINGS[spelling]
        if not any(old in getattr(part, table) for part in _parts(code)):
            raise PatchError(f"{function.__module__}.{function.__qualname__} does not spell {spelling}")
        code = _exchanged(code, table, old, new(dtype))
    function.__code__ = code

    def restore() -> None:
        function.__code__ = former

    return restore


def function_of(symbol: Any) -> Any:
    """Return the Python function behind a descriptor, decorators and wrappers.

    Raises:
        PatchError: there is none.
    """
    function = inspect.unwrap(getattr(symbol, "__func__", symbol))
    if not inspect.isfunction(function):
        raise PatchError(f"{symbol!r} is no Python function whose code could be edited")
    return function


def _parts(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


def _exchanged(code: CodeType, table: str, old: str, new: str) -> CodeType:
    inner = tuple(
        _exchanged(constant, table, old, new) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
    )
    code = code.replace(co_consts=inner)
    exchanged = tuple(new if _is(value, old) else value for value in getattr(code, table))
    return code.replace(co_names=exchanged) if table == "co_names" else code.replace(co_consts=exchanged)


def _is(value: Any, text: str) -> bool:
    return isinstance(value, str) and value == text
