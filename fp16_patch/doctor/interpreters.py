"""Finds the Python that a command line runs, as far as that can be known without running it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path, PurePath

from fp16_patch.doctor.launchers import ELSEWHERE, RUNNERS, STARTERS, WRAPPERS, Words, behind, is_python, known_row
from fp16_patch.untrusted.reading import Unreadable, opened

# Say which Python a name stands for, so that they are asked themselves. The other launchers are passed over: to ask
# through `srun` would take a place on the cluster.
_CHOOSERS: frozenset[Words] = frozenset([("env",), *((name, "run") for name in RUNNERS.split())])
# Options of Python that keep what is on PYTHONPATH, or in site-packages, from it.
_OF_IMPORTS = "EIPsS"
# A word of options: those that stand alone, then one that begins the program, or one with a value behind it.
_OPTION = re.compile(r"-([a-zA-Z?]*?)(?:([cmWX])(.*))?", re.DOTALL)
_FIRST_LINE = re.compile(rb"#!\s*(.+)")
# What pip writes where the path is too long for a first line, or has a blank in it.
_LONG_FIRST_LINE = re.compile(rb"#!/bin/sh\r?\n'''exec' (.+) \"\$0\" \"\$@\"")
_MOST_READ = 4096


def interpreter_of(command: Words) -> Words | None:
    """Return the words that start the Python of a command, without its program: `("uv", "run", "python", "-I")`.

    None where it cannot be known: a shell's script, a program that is none of Python's, what runs elsewhere.
    """
    words: Words = tuple(command)
    chosen_by: Words = ()
    while (row := known_row(words)) is not None and row in WRAPPERS and (rest := behind(words[len(row) :])):
        program = rest[len(_assignments(rest)) :]
        if row in _CHOOSERS:
            chosen_by += words[: len(words) - len(program)]
        words = program
    if not words or row in ELSEWHERE:
        return None
    if row == ("python",):
        return (*chosen_by, words[0], *_options(words[1:]))
    if row == ("uv", "run"):
        return _of_uv(chosen_by, words)
    if chosen_by:
        return (*chosen_by, "python") if row in STARTERS else None
    return _of_script(words[0])


def _assignments(words: Words) -> Words:
    end = next((index for index, word in enumerate(words) if "=" not in word or word.startswith("-")), len(words))
    return words[:end]


def _of_uv(chosen_by: Words, words: Words) -> Words | None:
    """Read `uv run`, which runs a script or a module in the project's Python, or in one that the script describes."""
    at = next((index for index, word in enumerate(words) if word in ("-m", "--module") or word.endswith(".py")), None)
    if at is None or b"# /// script" in _beginning(Path(words[at])):
        return None
    return (*chosen_by, *words[:at], "python")


def _of_script(name: str) -> Words | None:
    """Read the first line of a script, such as those that pip makes of entry points."""
    path = shutil.which(name)
    text = b"" if path is None else _beginning(Path(path))
    line = _LONG_FIRST_LINE.match(text) or _FIRST_LINE.match(text)
    if line is None:
        return None
    try:
        words = tuple(shlex.split(line[1].decode()))
    except ValueError:  # also what is not UTF-8
        return None
    if words and PurePath(words[0]).name == "env":
        words = tuple(word for word in words[1:] if word != "-S" and "=" not in word)
    return (words[0], *_options(words[1:])) if words and is_python(words[0]) else None


def _beginning(path: Path) -> bytes:
    try:
        with opened(path) as file:
            return file.read(_MOST_READ)
    except (OSError, Unreadable):
        return b""


def _options(words: Words) -> Words:
    """Return those of Python's own options that decide what it can import."""
    kept: list[str] = []
    left = iter(words)
    for word in left:
        option = _OPTION.fullmatch(word)
        if option is None:
            break
        letters, ending, value = option.groups()
        kept += [f"-{letter}" for letter in letters if letter in _OF_IMPORTS]
        if ending in ("c", "m"):
            break
        if ending and not value:
            next(left, None)
    return tuple(kept)
