"""Finds the Python program that a command line runs, behind whatever starts it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import PurePath

from fp16_patch.plan.errors import Conflict

_PYTHON = re.compile(r"pythonw?[\d.]*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_OURS = "fp16-patch"

Words = tuple[str, ...]

# Run the program behind them in their own environment. Of their options nothing is known: what they run is the first
# word that names a program of these tables.
TOOLS = "command env exec ionice mpiexec mpirun ncu nice nohup numactl setsid srun stdbuf taskset time timeout tini"
RUNNERS = "conda hatch mamba micromamba pdm pipenv pixi poetry rye uv"
WRAPPERS: frozenset[Words] = frozenset(
    [*((name,) for name in TOOLS.split()), *((name, "run") for name in RUNNERS.split()), ("nsys", "profile")]
)
# Run a Python program: a script, or, after one of these options, a module.
STARTERS: dict[Words, Words] = {
    ("accelerate", "launch"): ("-m", "--module"),
    ("coverage", "run"): ("-m", "--module"),
    ("deepspeed",): ("--module",),
    ("python",): ("-m",),
    ("torchrun",): ("-m", "--module"),
    ("uv", "run"): ("-m", "--module"),
}
# The same, as modules that Python runs.
STARTER_MODULES: dict[str, Words] = {
    "accelerate.commands.launch": ("-m", "--module"),
    "cProfile": ("-m",),
    "debugpy": ("-m",),
    "deepspeed.launcher.runner": ("--module",),
    "pdb": ("-m",),
    "torch.distributed.launch": ("-m", "--module"),
    "torch.distributed.run": ("-m", "--module"),
}
# Run a command where the environment of this process does not reach it, and where `fp16-patch run` goes then.
ELSEWHERE: dict[Words, str] = {
    ("docker", "exec"): f"docker exec … {_OURS} run -- python …",
    ("docker", "run"): f"docker run … {_OURS} run -- python …",
    ("kubectl", "exec"): f"kubectl exec … -- {_OURS} run -- python …",
    ("podman", "exec"): f"podman exec … {_OURS} run -- python …",
    ("podman", "run"): f"podman run … {_OURS} run -- python …",
    ("ray", "exec"): f"ray exec … '{_OURS} run -- python …'",
    ("ray", "job", "submit"): f"ray job submit … -- {_OURS} run -- python …",
    ("ssh",): f"ssh … {_OURS} run -- python …",
    ("sudo",): f"sudo … {_OURS} run -- python …",
}
_STAYS = "the plan would stay with the submitting client"
# Without PYTHONPATH even under -E.
_STAYS_BEHIND: dict[Words, str] = {
    ("sudo",): "the plan would stay in the caller's environment, and the command gets another"
}
SHELLS = frozenset({"bash", "dash", "ksh", "sh", "zsh"})
# A separator in a shell's words; what stands between two is one command.
_SEPARATORS = re.compile(r"[;&|\n()]+")
_REDIRECTION = re.compile(r"\d*[<>].*")


@dataclass(frozen=True)
class Program:
    """What a command line runs in the end.

    Attributes:
        name: the dotted name of a module, or a script's path; None if no Python program was found.
        is_module: which of the two it is.
        arguments: its own arguments.
        environment: variables that are set on the way, as by `env A=b`.
        mode: what a `fp16-patch run --mode` on the way says.
        problems: why the plan would not reach it from where the command is typed.
    """

    name: str | None = None
    is_module: bool = False
    arguments: Words = ()
    environment: dict[str, str] = field(default_factory=dict)
    mode: str | None = None
    problems: tuple[Conflict, ...] = ()


def program_of(command: Sequence[str]) -> Program:
    """Peel off what starts the program, one launcher at a time."""
    words = tuple(command)
    if words and (assigned := _ASSIGNMENT.fullmatch(words[0])):
        inner = program_of(words[1:])
        return replace(inner, environment={assigned[1]: assigned[2], **inner.environment})
    known = known_row(words)
    if known is None:
        return _script(words)
    rest = words[len(known) :]
    if known in ELSEWHERE:
        return _elsewhere(known, rest)
    if known == (_OURS, "run"):
        return _started_by_us(rest)
    if known[0] in SHELLS:
        return _in_shell(rest)
    if known in WRAPPERS and (inner_words := behind(rest)):
        return program_of(inner_words)
    return _started(rest, STARTERS[known]) if known in STARTERS else Program()


def is_python(word: str) -> bool:
    """Return whether a program's name is one of Python's."""
    return _PYTHON.fullmatch(PurePath(word).name) is not None


def known_row(words: Words) -> Words | None:
    """Return the row of a table that these words begin with."""
    if not words:
        return None
    first = PurePath(words[0]).name
    if is_python(first):
        return ("python",)
    if first in SHELLS:
        return (first,)
    rows = (*WRAPPERS, *STARTERS, *ELSEWHERE, (_OURS, "run"))
    named = (first, *words[1:])
    return next((row for row in rows if named[: len(row)] == row), None)


def behind(words: Words) -> Words:
    """Return the words from the first that names a program, and what is set for it in front; none if there is none."""
    end = words.index("--") if "--" in words else len(words)
    start = next((index for index in range(end) if known_row(words[index:])), None)
    if start is None:
        return words[end + 1 :]
    while start > 0 and _ASSIGNMENT.fullmatch(words[start - 1]) and not words[max(start - 2, 0)].startswith("--"):
        start -= 1
    return words[start:]


def _elsewhere(submitter: Words, words: Words) -> Program:
    rest = behind(words)
    inner = program_of(rest)
    if _is_started_by_us(rest):
        return inner
    conflict = Conflict(
        "command",
        " ".join(submitter),
        _STAYS_BEHIND.get(submitter, _STAYS),
        f"turn it round: {ELSEWHERE[submitter]}",
    )
    return replace(inner, problems=(conflict, *inner.problems))


def _started(words: Words, module_options: Words) -> Program:
    option = next((index for index, word in enumerate(words) if word in module_options), None)
    script = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    if option is not None and (script is None or option < script):
        at = next((index for index in range(option + 1, len(words)) if _MODULE.fullmatch(words[index])), None)
        return Program() if at is None else _module(words[at], words[at + 1 :])
    return Program() if script is None else Program(words[script], False, words[script + 1 :])


def _module(name: str, arguments: Words) -> Program:
    if name in STARTER_MODULES:
        return _started(arguments, STARTER_MODULES[name])
    if name.removesuffix(".cli") == "fp16_patch" and arguments[:1] == ("run",):
        return _started_by_us(arguments[1:])
    return Program(name, True, arguments)


def _script(words: Words) -> Program:
    """Read a script that is run by its first line."""
    return Program(words[0], False, words[1:]) if words and words[0].endswith(".py") else Program()


def _started_by_us(words: Words) -> Program:
    options = list(words[: words.index("--")] if "--" in words else words[:1])
    mode = None
    for index, word in enumerate(options):
        if word.startswith("--mode="):
            mode = word.partition("=")[2]
        elif word == "--mode" and index + 1 < len(words):
            mode = words[index + 1]
    inner = program_of(behind(words))
    return replace(inner, mode=inner.mode or mode)


def _is_started_by_us(words: Words) -> bool:
    return bool(words) and (known_row(words) == (_OURS, "run") or words[1:4] == ("-m", "fp16_patch", "run"))


def _in_shell(words: Words) -> Program:
    """Read the text of `bash -c`: the last of its commands that runs a Python program."""
    option = next((index for index, word in enumerate(words) if re.fullmatch(r"-[a-z]*c", word)), len(words))
    text = "".join(words[option + 1 : option + 2])
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=";&|()\n")
    lexer.whitespace, lexer.whitespace_split = " \t\r", True
    environment: dict[str, str] = {}
    found = Program()
    try:
        commands = _commands(list(lexer))
    except ValueError:  # a quote that does not end: the shell will say so
        return found
    for command in commands:
        if command[:1] == ("export",):
            environment |= {each[1]: each[2] for word in command[1:] if (each := _ASSIGNMENT.fullmatch(word))}
        elif (program := program_of(command)).name is not None or program.problems:
            found = program
    return replace(found, environment={**environment, **found.environment})


def _commands(words: Sequence[str]) -> list[Words]:
    commands: list[list[str]] = [[]]
    for word in words:
        if _SEPARATORS.fullmatch(word):
            commands.append([])
        else:
            commands[-1].append(word)
    return [_before_redirection(command) for command in commands if command]


def _before_redirection(command: Sequence[str]) -> Words:
    return tuple(takewhile(lambda word: not _REDIRECTION.fullmatch(word), command))
