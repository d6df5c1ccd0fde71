"""Parses an OpenRLHF command line with OpenRLHF's own parser, without importing or running it."""

from __future__ import annotations

import argparse
import ast
import difflib
import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
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
        raise PlanError([_rejected(parser, message)])

    parser.error = refuse  # type: ignore[method-assign]
    return _nested(vars(_parsed(parser, flags)))


def _parsed(parser: argparse.ArgumentParser, flags: Sequence[str]) -> argparse.Namespace:
    with redirect_stdout(io.StringIO()):
        try:
            return parser.parse_args(list(flags))
        except SystemExit as ended:
            raise PlanError([Conflict("command", "--help", "it prints, and trains nothing", "leave it out")]) from ended
        except (ArithmeticError, AttributeError, LookupError) as problem:
            # A flag's own reader: of what it raises, argparse knows two kinds.
            raise PlanError([_rejected(parser, f"{type(problem).__name__}: {problem}")]) from problem


def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the parser that a module of `openrlhf.cli` builds in its main block.

    Only the statements up to `parse_args` are run, with the standard library's imports: importing the module itself
    loads torch, vLLM and DeepSpeed, for half a minute, and running it trains.

    Raises:
        PlanError: the module is not installed, or builds its parser in another way.
        SourceError: it cannot be read as Python.
    """
    source = Installed().read(module)
    if source is None:
        raise PlanError([Conflict("command", module, "no such module is installed", "pip install openrlhf")])
    try:
        return _built(ast.parse(source), module)
    except Exception as problem:  # what a fork does there may fail in any way
        reason = f"its parser is not where OpenRLHF's are ({problem!r})"
        raise PlanError([Conflict("command", module, reason, "install a release of the support table")]) from problem


def _rejected(parser: argparse.ArgumentParser, message: str) -> Conflict:
    """Name the one flag that argparse rejects, with argparse's reason."""
    if switch := re.fullmatch(r"argument (\S+): ignored explicit argument '(.*)'", message):
        reason = f"argparse rejects it: {switch[1]} is a switch, which takes no value"
        return Conflict(switch[1], switch[2], reason, "leave it out, or give it alone to switch it on")
    if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = unknown[1].split()
        flag = next((word.partition("=")[0] for word in words if word.startswith("--")), words[0])
        return Conflict("command", flag, f"argparse rejects it: {message}", _nearest(parser, flag))
    named = re.match(r"(?:argument|ambiguous option:|the following arguments are required:) ([^\s:,]+)", message)
    return Conflict("command", named[1] if named else "flags", f"argparse rejects it: {message}", "mend the flag")


def _nearest(parser: argparse.ArgumentParser, flag: str) -> str:
    known = sorted(set(re.findall(r"--[\w.]+", parser.format_help())))
    # Up to 0.10.1 flags have no sections, then they do: the last part says more than the whole.
    last = {name.rpartition(".")[2].lstrip("-"): name for name in known}
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.8) or [
        last[name] for name in difflib.get_close_matches(flag.rpartition(".")[2].lstrip("-"), last, n=1, cutoff=0.8)
    ]
    return f"did you mean {near[0]}? Else leave it out" if near else "leave it out, or install the release that has it"


def _built(tree: ast.Module, module: str) -> argparse.ArgumentParser:
    main = next(node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.dump(node.test))
    at, call = next((at, call) for at, node in enumerate(main.body) for call in ast.walk(node) if _parses(call))
    statements = [node for node in tree.body if _is_of_standard_library(node)] + main.body[:at]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(statements, []), module, "exec"), names)
    parser = names[call.value.id]  # type: ignore[attr-defined]
    if not isinstance(parser, argparse.ArgumentParser):
        raise TypeError(f"{call.value.id} is a {type(parser).__name__}")  # type: ignore[attr-defined]
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
