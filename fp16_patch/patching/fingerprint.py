"""Hashes one function's source: the same on every Python, another when the code changes.

`ast.dump`, `ast.unparse` and the token stream of f-strings differ between Python releases; positions in the source do
not. So the text between a definition's positions is hashed, without its comments, docstring and blank space.
"""

from __future__ import annotations

import ast
import hashlib
import io
import textwrap
import tokenize
from functools import lru_cache

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_DIGITS = 16


def fingerprint(source: str, qualname: str) -> str | None:
    """Return the fingerprint of `qualname` (`Class.method` or `function`) in `source`; None if it is absent."""
    node = _definitions_of(source).get(qualname)
    return None if node is None else _digest(node, source.splitlines())


def definition(source: str, qualname: str) -> str | None:
    """Return the text of the definition, for people to read; None if it is absent."""
    node = _definitions_of(source).get(qualname)
    if node is None:
        return None
    return textwrap.dedent("\n".join(source.splitlines()[_first_row(node) - 1 : _last_row(node)]))


def parsed(source: str, qualname: str) -> Definition | None:
    """Return the definition's syntax tree; None if it is absent."""
    return _definitions_of(source).get(qualname)


@lru_cache(maxsize=32)
def _definitions_of(source: str) -> dict[str, Definition]:
    return dict(_definitions(ast.parse(source).body, ""))


def _definitions(body: list[ast.stmt], prefix: str) -> list[tuple[str, Definition]]:
    found: list[tuple[str, Definition]] = []
    for node in body:
        if isinstance(node, Definition):
            found.append((prefix + node.name, node))
        if isinstance(node, ast.ClassDef):
            found.extend(_definitions(node.body, f"{prefix}{node.name}."))
        elif isinstance(node, ast.If | ast.Try):
            found.extend(_definitions(node.body, prefix))
    return found


def _digest(node: Definition, lines: list[str]) -> str:
    docstring = _docstring_rows(node)
    rows = [row for row in range(_first_row(node), _last_row(node) + 1) if row not in docstring]
    code = _without_comments(textwrap.dedent("\n".join(lines[row - 1] for row in rows)))
    kept = (line.rstrip() for line in code)
    return hashlib.sha256("\n".join(filter(None, kept)).encode()).hexdigest()[:_DIGITS]


def _first_row(node: Definition) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _last_row(node: Definition) -> int:
    return node.end_lineno or node.lineno


def _without_comments(code: str) -> list[str]:
    lines = code.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return lines


def _docstring_rows(node: Definition) -> range:
    if ast.get_docstring(node, clean=False) is None:
        return range(0)
    docstring = node.body[0]
    return range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)
