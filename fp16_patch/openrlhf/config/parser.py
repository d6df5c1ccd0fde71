"""Parses an OpenRLHF command line with OpenRLHF's own parser, without importing or running it."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from fp16_patch.patching.sources import Installed
from fp16_patch.plan.errors import Conflict, PlanError


def parsed(module: str, flags: Sequence[str]) -> Any:
    """Return the arguments that OpenRLHF makes of these flags, in its nested namespaces or, up to 0.10.1, in one.

    Args:
        module: whose main parses them, as `openrlhf.cli.train_ppo_ray`.

    Raises:
        PlanError: it is not installed, has no parser that could be found, or rejects the flags.
    """
    parser = parser_of(module)

    def refuse(message: str) -> NoReturn:
        raise PlanError([Conflict("command", f"{module} {' '.join(flags)}", message, "mend the flag")])

    parser.error = refuse  # type: ignore[method-assign]
    return _nested(vars(parser.parse_args(list(flags))))


def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the parser that a module of `openrlhf.cli` builds in its main block.

    Only the statements up to `parse_args` are run, with the standard library's imports: importing the module itself
    loads torch, vLLM and DeepSpeed, for half a minute, and running it trains.

    Raises:
        PlanError: the module is not installed, or builds its parser in another way.
    """
    source = Installed().read(module)
    if source is None:
        raise PlanError([Conflict("command", module, "no such module is installed", "pip install openrlhf")])
    try:
        return _built(ast.parse(source), module)
    except (StopIteration, NameError, KeyError) as problem:
        reason = f"its parser is not where OpenRLHF's are ({problem!r})"
        raise PlanError([Conflict("command", module, reason, "install a release of the support table")]) from problem


def _built(tree: ast.Module, module: str) -> argparse.ArgumentParser:
    main = next(node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.dump(node.test))
    at, call = next((at, call) for at, node in enumerate(main.body) for call in ast.walk(node) if _parses(call))
    statements = [node for node in tree.body if _is_of_standard_library(node)] + main.body[:at]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(statements, []), module, "exec"), names)
    parser: argparse.ArgumentParser = names[call.value.id]  # type: ignore[attr-defined]
    return parser


def _parses(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "parse_args" and isinstance(node.value, ast.Name)


def _is_of_standard_library(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        return all(alias.name.partition(".")[0] in sys.stdlib_module_names for alias in node.names)
    return isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in sys.stdlib_module_names


def _nested(arguments: dict[str, Any]) -> Any:
    """Nest `a.b` as OpenRLHF does."""
    root = SimpleNamespace()
    for name, value in arguments.items():
        *path, last = name.split(".")
        space = root
        for part in path:
            if not hasattr(space, part):
                setattr(space, part, SimpleNamespace())
            space = getattr(space, part)
        setattr(space, last, value)
    return root
