"""Writes a declared edit into one function of a module's text; every other character stays what it is."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import NamedTuple

from fp16_patch.patching.code_object_patch import SPELLINGS
from fp16_patch.patching.declarations import ByEdit
from fp16_patch.patching.fingerprint import parsed
from fp16_patch.plan.errors import PatchError
from fp16_patch.plan.plan import Plan

_LINES = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")
_NAMES = re.compile(r"\{(\w+)\}")
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef)


def rewritten(source: str, qualname: str, edit: ByEdit, plan: Plan) -> str:
    """Return the source with the edit made in one of its functions.

    Args:
        plan: whose dtype and settings are written in.

    Raises:
        PatchError: the function is not there, lacks what is to be replaced, or is laid out in a way that leaves no line
            of its own for a statement.
    """
    function = parsed(source, qualname)
    if not isinstance(function, _SCOPES):
        raise PatchError(f"{qualname}: no such function")
    written = _Writing(source, function, plan).changes(edit)
    result = _applied(source, written)
    try:
        ast.parse(result)
    except SyntaxError as problem:
        raise PatchError(f"{qualname}: the edit leaves what is no Python ({problem})") from problem
    return result


def filled_in(text: str, plan: Plan) -> str:
    """Put the plan's values for `{dtype}` and the names of its settings into what a declaration writes."""
    values = {**asdict(plan), "dtype": plan.dtype}
    return _NAMES.sub(lambda name: str(values.get(name[1], name[0])), text)


class _Change(NamedTuple):
    start: int
    end: int
    text: str


def _applied(source: str, changes: Iterable[_Change]) -> str:
    parts, position = [], 0
    for change in sorted(changes, key=lambda each: each[:2]):
        if change.start < position:
            raise PatchError(f"two edits of the same text: {change.text!r}")
        parts += [source[position : change.start], change.text]
        position = change.end
    return "".join([*parts, source[position:]])


class _Writing:
    """Turns one function's edits into changes of the text it stands in."""

    def __init__(self, source: str, function: ast.FunctionDef | ast.AsyncFunctionDef, plan: Plan) -> None:
        self.source, self.function, self.plan = source, function, plan
        self.lines = _LINES.split(source)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.newline = "\r\n" if self.lines[0].endswith("\r\n") else "\n"

    def changes(self, edit: ByEdit) -> Iterator[_Change]:
        # In this order: of two at one place, the first goes before.
        if edit.before:
            yield self._at_start(edit.before)
        if edit.after:
            yield from self._at_end(edit.after)
        for old, new in edit.replace.items():
            yield from self._replacing(old, new)
        for spelling in edit.edit:
            yield from self._exchanging(spelling, edit.edit_to or str(self.plan.dtype))

    def _at_start(self, statements: str) -> _Change:
        body, docstring = self.function.body, ast.get_docstring(self.function, clean=False)
        if docstring is not None and len(body) == 1:
            return self._after_line(body[0], statements)
        first = body[0] if docstring is None else body[1]
        row = min([first.lineno, *(each.lineno for each in getattr(first, "decorator_list", ()))])
        indent = self._indent(row, first.col_offset)
        header = self._header_end() if docstring is None else body[0].end_lineno or 0
        while row - 1 > header and self.lines[row - 2].lstrip().startswith("#"):
            row -= 1  # a comment stays with the statement that it is about
        return self._insert(self.starts[row - 1], statements, indent)

    def _header_end(self) -> int:
        header = [node for part in (self.function.args, self.function.returns) if part for node in ast.walk(part)]
        return max([self.function.lineno, *(getattr(node, "end_lineno", 0) for node in header)])

    def _at_end(self, statements: str) -> Iterator[_Change]:
        if not _ends(self.function.body):
            yield self._after_line(self.function.body[-1], statements)
        for end in _returns(self.function.body):
            yield self._insert(self.starts[end.lineno - 1], statements, self._indent(end.lineno, end.col_offset))

    def _after_line(self, node: ast.stmt, statements: str) -> _Change:
        indent = self._indent(self.function.body[0].lineno, self.function.body[0].col_offset)
        row = node.end_lineno or node.lineno
        change = self._insert(self.starts[row], statements, indent)
        complete = self.lines[row - 1].endswith(("\n", "\r"))
        return change if complete else change._replace(text=self.newline + change.text.rstrip("\r\n"))

    def _insert(self, position: int, statements: str, indent: str) -> _Change:
        lines = filled_in(textwrap.dedent(statements).strip("\n"), self.plan).splitlines()
        text = "".join(f"{indent}{line}{self.newline}" if line else self.newline for line in lines)
        return _Change(position, position, text)

    def _indent(self, row: int, column: int) -> str:
        indent = self.lines[row - 1][:column]
        if indent.strip():
            raise PatchError(f"{self.function.name}: line {row} holds more than one statement")
        return indent

    def _replacing(self, old: str, new: str) -> Iterator[_Change]:
        wanted = ast.dump(ast.parse(old, mode="eval").body)
        for node in self._found(lambda node: ast.dump(node) == wanted, old):
            yield _Change(*self._span(node), filled_in(new, self.plan))

    def _exchanging(self, spelling: str, dtype: str) -> Iterator[_Change]:
        table, old, new = SPELLINGS[spelling]
        called = {id(each.func) for each in ast.walk(self.function) if isinstance(each, ast.Call)}

        def spells(node: ast.AST) -> bool:
            if table == "co_consts":
                return isinstance(node, ast.Constant) and node.value == old
            is_call = id(node) in called
            return isinstance(node, ast.Attribute) and node.attr == old and is_call is spelling.endswith("()")

        for node in self._found(spells, spelling):
            start, end = self._span(node)
            at = self.source.rfind(old, start, end)
            if at < 0:
                raise PatchError(f"{self.function.name}: {spelling} is not spelled in one piece")
            yield _Change(at, at + len(old), new(dtype))

    def _found(self, wanted: Callable[[ast.AST], bool], text: str) -> list[ast.expr]:
        found = [node for statement in self.function.body for node in _outermost(statement, wanted)]
        if not found:
            raise PatchError(f"{self.function.name}: {text} does not occur")
        return found

    def _span(self, node: ast.expr) -> tuple[int, int]:
        end_row, end_column = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
        return self._position(node.lineno, node.col_offset), self._position(end_row, end_column)

    def _position(self, row: int, column: int) -> int:
        # ast counts the bytes of a line in UTF-8.
        return self.starts[row - 1] + len(self.lines[row - 1].encode()[:column].decode())


def _outermost(node: ast.AST, wanted: Callable[[ast.AST], bool]) -> Iterator[ast.expr]:
    if isinstance(node, ast.expr) and wanted(node):
        yield node
    elif not _is_text(node):
        for child in ast.iter_child_nodes(node):
            yield from _outermost(child, wanted)


def _is_text(node: ast.AST) -> bool:
    # A docstring; or an f-string, in which Python before 3.12 does not know where things stand.
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _ends(body: list[ast.stmt]) -> bool:
    last = body[-1]
    if isinstance(last, ast.If):
        return _ends(last.body) and bool(last.orelse) and _ends(last.orelse)
    return isinstance(last, ast.Return | ast.Raise)


def _returns(body: list[ast.stmt]) -> Iterator[ast.Return]:
    """Yield the returns that a body ends with, in each branch of an `if` that ends it."""
    last = body[-1]
    if isinstance(last, ast.Return):
        yield last
    elif isinstance(last, ast.If) and _ends(body):
        yield from _returns(last.body)
        yield from _returns(last.orelse)
