"""Composes the configuration of a command line as hydra does for verl's own main, without importing verl."""

from __future__ import annotations

import argparse
import ast
import difflib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fp16_patch.patching.sources import installed_file, source_of
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.untrusted.paths import is_file, is_folder, problem_of

_NO_RUN = {
    "help": "--help",
    "hydra_help": "--hydra-help",
    "cfg": "--cfg",
    "info": "--info",
    "shell_completion": "--shell-completion",
}
_LONGEST_REASON = 300
_GRAMMAR = "hydra cannot read the value"
_QUOTED = """quote it for hydra as well as for the shell: "{key}='{value}'\""""

Compose = Callable[[Sequence[str]], Any]


class Declared(NamedTuple):
    """What `@hydra.main` of a program says: the folder of its configurations, and the one that it starts from."""

    config_path: str | None = None
    config_name: str | None = None


def composed(module: str, arguments: Sequence[str], script: Path | None = None) -> Any:
    """Return the configuration that verl would start from.

    Args:
        module: the main's name, as `verl.trainer.main_ppo`.
        arguments: what is behind it on the command line.
        script: its file, where one was given instead; it counts only if it is there.

    Raises:
        PlanError: it is not installed, or hydra rejects an argument: which one, and why.
        SourceError: the program cannot be read as Python.
    """
    file = script if script is not None and is_file(script) else installed_file(module)
    if file is None:
        fix = "use a main of this release, or install the one that has it"
        raise PlanError([Conflict("command", module, "the installed verl has no such program", fix)])
    options = _options(arguments)
    declared = declared_in(file)
    with _search_path(options, declared, file) as compose:
        return _composed(compose, options.overrides)


def declared_in(file: Path) -> Declared:
    """Read the arguments of `@hydra.main` from a program's source.

    Raises:
        PlanError: it computes them.
        SourceError: it cannot be read as Python.
    """
    calls = (
        call
        for node in ast.walk(ast.parse(source_of(file).python(file)))
        if isinstance(node, ast.FunctionDef)
        for call in node.decorator_list
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("hydra.main", "main")
    )
    given = {word.arg: word.value for call in calls for word in call.keywords if word.arg in Declared._fields}
    return Declared(**{str(name): _literal(value, str(name), file) for name, value in given.items()})


def _literal(value: ast.expr, name: str, file: Path) -> str | None:
    if isinstance(value, ast.Constant) and isinstance(value.value, str | None):
        return value.value
    reason, fix = f"{file} computes it, and is not run to see", "write it there, or give it as an option"
    raise PlanError([Conflict(f"@hydra.main({name})", ast.unparse(value), reason, fix)])


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments with hydra's own parser."""
    from hydra.main import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise PlanError([_no_option(message)])

    parser.error = refuse  # type: ignore[method-assign]
    options = _parsed(parser, arguments)
    for name, flag in _NO_RUN.items():
        if getattr(options, name):
            raise PlanError([Conflict("command", flag, "it prints, and trains nothing", "leave it out")])
    if options.multirun:
        fix = "leave it out, and give the command of one run"
        raise PlanError([Conflict("command", "--multirun", "a sweep is several runs", fix)])
    return options


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    with redirect_stdout(io.StringIO()):
        try:
            return parser.parse_args(list(arguments))
        except SystemExit as ended:
            conflict = Conflict("command", "--version", "it prints, and trains nothing", "leave it out")
            raise PlanError([conflict]) from ended


def _no_option(message: str) -> Conflict:
    """Name the one word that hydra's parser rejects."""
    said, _, rest = message.partition("unrecognized arguments: ")
    unknown = next((word for word in rest.split() if word.startswith("-")), None)
    if unknown is not None:
        return Conflict("command", unknown, "hydra has no such option", "leave it out")
    if rest:
        reason = "hydra reads no overrides behind an option that stands between them"
        return Conflict("command", rest.split()[0], reason, "put --config-name, --config-path and the like first")
    return Conflict(
        "command", said.removeprefix("argument ").partition(":")[0], f"hydra says: {said}", "mend the option"
    )


def _search_path(options: argparse.Namespace, declared: Declared, file: Path) -> Any:
    """Return a context that gives a function to compose with: overrides → configuration."""
    from contextlib import contextmanager

    from hydra import compose, initialize_config_dir, initialize_config_module

    path = options.config_path if options.config_path is not None else declared.config_path
    name = options.config_name or declared.config_name
    folder = _folder(path, file)
    extra = [f"hydra.searchpath=[{_extra_folder(options.config_dir).as_uri()}]"] if options.config_dir else []

    @contextmanager
    def composing() -> Iterator[Compose]:
        in_package = isinstance(folder, str)
        where = (
            initialize_config_module(folder, version_base=None)
            if in_package
            else initialize_config_dir(str(folder), version_base=None)
        )
        with where:
            yield lambda overrides: compose(config_name=name, overrides=[*extra, *overrides])

    return composing()


def _folder(config_path: str | None, file: Path) -> Path | str:
    """Resolve hydra's `--config-path`: against the folder of the program that is run, not of the shell.

    Returns:
        A folder, or a package's name for `pkg://`.

    Raises:
        PlanError: there is no such folder here.
    """
    if config_path is not None and config_path.startswith("pkg://"):
        return config_path.removeprefix("pkg://").replace("/", ".")
    start = Path(os.path.realpath(file)).parent
    folder = _real(start / (config_path or ""), "--config-path", config_path)
    if not is_folder(folder):
        reason = f"there is no folder {folder} on this machine"
        fix = f"a relative path starts from {start}; --config-dir takes one of the shell's"
        if config_path is not None and Path(config_path).is_absolute():
            fix = "ask where the run will start, or give a copy of that folder"
        raise PlanError([Conflict("--config-path", config_path, reason, fix)])
    return folder


def _extra_folder(config_dir: str) -> Path:
    """Resolve hydra's `--config-dir`, against the folder of the shell.

    Raises:
        PlanError: there is no such folder here.
    """
    folder = _real(Path(config_dir), "--config-dir", config_dir)
    if not is_folder(folder):
        reason = f"there is no folder {folder} on this machine"
        raise PlanError([Conflict("--config-dir", config_dir, reason, "give a folder that is here")])
    return folder


def _real(path: Path, option: str, given: str | None) -> Path:
    """Resolve a path, its links and its `..`.

    Raises:
        PlanError: nothing can lie there.
    """
    problem = problem_of(path)
    if problem is not None:
        raise PlanError([Conflict(option, given, problem, "give a folder that is here")])
    return Path(os.path.realpath(path))


def _composed(compose: Compose, overrides: Sequence[str]) -> Any:
    from hydra.errors import MissingConfigException

    try:
        return compose(overrides)
    except Exception as problem:  # of a damaged YAML or override, hydra and its parsers raise whatever comes
        culprit, reason = _culprit(compose, overrides, problem)
        if culprit is not None:
            raise PlanError([_rejected(culprit, reason, compose)]) from problem
        key = "--config-name" if isinstance(reason, MissingConfigException) else "command"
        fix = "name a configuration of that folder"
        raise PlanError([Conflict(key, _name_of(reason), _reason(reason), fix)]) from problem


def _culprit(compose: Compose, overrides: Sequence[str], problem: Exception) -> tuple[str | None, Exception]:
    """Find the first override that hydra rejects: the last of the shortest rejected beginning.

    Returns:
        It, and what hydra says without those behind it; None if the configuration itself is rejected.
    """
    accepted, rejected = -1, len(overrides)
    while rejected - accepted > 1:
        middle = (accepted + rejected) // 2
        try:
            compose(overrides[:middle])
            accepted = middle
        except Exception as earlier:
            rejected, problem = middle, earlier
    return (overrides[rejected - 1] if rejected else None), problem


def _rejected(override: str, problem: Exception, compose: Compose) -> Conflict:
    key, equals, value = override.partition("=")
    if not equals:
        fix = "give key=value; a blank by itself comes from a backslash that does not end its line"
        return Conflict("command", repr(override), "hydra takes key=value only", fix)
    said = f"{problem} {problem.__cause__ or ''}"
    reason, fix = next((row[1:] for row in _REJECTIONS if row[0] in said), (None, "mend the override"))
    near = _nearest_key(key, compose) if _NO_KEY in said else None
    fix = fix.format(key=key.lstrip("+~"), value=value)
    return Conflict(key, value, reason or _reason(problem), f"did you mean {near}? Else {fix}" if near else fix)


_NO_KEY = "is not in struct"
# What hydra says, what that means, what helps. Of what is not here, hydra's own words are the reason.
_REJECTIONS: tuple[tuple[str, str | None, str], ...] = (
    (
        _NO_KEY,
        "verl's configuration has no such key in this release",
        "leave it out; +{key}={value} adds a key of your own",
    ),
    ("Could not append to config", "verl's configuration has this key already", "leave the + out: {key}={value}"),
    ("Ambiguous value", "hydra takes the comma for a sweep", "quote the value, or write a list: {key}=[{value}]"),
    ("Could not find", None, "use one of those"),
    ("Exception:", _GRAMMAR, _QUOTED),
    ("mismatched input", _GRAMMAR, _QUOTED),
    ("no viable alternative", _GRAMMAR, _QUOTED),
    ("extraneous input", _GRAMMAR, _QUOTED),
    ("token recognition", _GRAMMAR, _QUOTED),
)


def _nearest_key(key: str, compose: Compose) -> str | None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parent, _, name = key.rpartition(".")
    try:
        section = OmegaConf.select(compose([]), parent) if parent else compose([])
    except OmegaConfBaseException:
        return None  # what is in front of the last dot is no key
    known = list(section) if OmegaConf.is_dict(section) else []
    # One slip is a typo; a key that differs by more is another key.
    near = difflib.get_close_matches(name, map(str, known), n=1, cutoff=max(0.5, 1 - 1.5 / len(name or "?")))
    return f"{parent}.{near[0]}" if near and parent else (near[0] if near else None)


def _reason(problem: Exception) -> str:
    """Say in one line why hydra rejects something."""
    lines = [line.strip() for line in f"{problem}\n{problem.__cause__ or ''}".splitlines()]
    said = [
        line for line in lines if line.strip("^ ") and not line.startswith(("See https://", "full_key", "object_type"))
    ]
    search_path = next((at for at, line in enumerate(said) if line.startswith("Config search path")), len(said))
    text = "; ".join(said[:search_path]) or type(problem).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"


def _name_of(problem: Exception) -> object:
    return getattr(problem, "missing_cfg_file", None) or "configuration"
