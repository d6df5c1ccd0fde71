"""What a setting is: its type, its default, what it may be, what it means, where it applies."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field
from numbers import Real
from typing import Any, Protocol

EVERYWHERE = "everywhere"

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")


class Check(Protocol):
    """What a value has to be, beside being of the setting's type."""

    def problem(self, value: Any, default: Any) -> tuple[str, str] | None:
        """Return what is wrong with `value` and the fix; None if it is good."""

    def text(self) -> str:
        """Say what values are good, for the settings page."""


@dataclass(frozen=True)
class Range:
    """A bounded number.

    Attributes:
        good: whether a number lies in the range.
        wanted: the range in words, after "use".
        zero: what 0 stands for, where that needs saying.
    """

    good: Callable[[Any], bool]
    wanted: str
    zero: str | None = None

    def problem(self, value: Any, default: Any) -> tuple[str, str] | None:
        if self.good(value):
            return None
        fix = [f"use {self.wanted}", f"{default:g} by default", *self._zero()]
        return "out of range", ", ".join(fix)

    def text(self) -> str:
        return ", ".join([self.wanted, *self._zero()])

    def _zero(self) -> list[str]:
        return [] if self.zero is None else [f"0 for {self.zero}"]


@dataclass(frozen=True)
class Choice:
    """One of a few words; `what` names the kind of thing they are."""

    words: tuple[str, ...]
    what: str

    def problem(self, value: Any, default: Any) -> tuple[str, str] | None:
        return None if value in self.words else (f"no such {self.what}", f"use {' or '.join(self.words)}")

    def text(self) -> str:
        return ", ".join(f"`{word}`" for word in self.words)


@dataclass(frozen=True)
class Modes:
    """One of the plan's modes, or a word that stands for one."""

    dtypes: dict[str, str | None]

    def problem(self, value: Any, default: Any) -> tuple[str, str] | None:
        known = ", ".join(self.dtypes)
        return None if value in self.dtypes else ("no such mode", f"use one of {known} (1 = {default})")

    def text(self) -> str:
        return ", ".join(f"`{mode}`" for mode in self.dtypes)


@dataclass(frozen=True)
class PathText:
    """A path that a file system may hold, if it is given."""

    def problem(self, value: Any, default: Any) -> tuple[str, str] | None:
        if value is None:
            return None
        if "\0" in value:
            return "no path holds a NUL", "give a path without it"
        if len(value) > _LONGEST_PATH:
            return f"longer than {_LONGEST_PATH} characters", "give a shorter path"
        return None

    def text(self) -> str:
        return "a path"


def between(least: float, most: float) -> Callable[[float], bool]:
    """Return whether a number lies there, both ends included; NaN does not."""
    return lambda value: least <= value <= most


def above(least: float, most: float) -> Callable[[float], bool]:
    """Return whether a number lies there, the lower end left out; NaN does not."""
    return lambda value: least < value <= most


def parse_word(value: Any) -> str:
    """Read a word, in small letters. YAML makes bools and numbers of `on`, `off` and `1`.

    Raises:
        ValueError: it is nothing that YAML makes of a word.
    """
    if not isinstance(value, str | bool | int):
        raise ValueError(type(value))
    return str(value).strip().lower()


def parse_bool(value: Any) -> bool:
    """Read a bool from one of `TRUE_WORDS` and `FALSE_WORDS`, in any case.

    Raises:
        ValueError: it is another word.
    """
    word = parse_word(value)
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(type(value))
    return word in TRUE_WORDS


def parse_float(value: Any) -> float:
    """Read a number. A text is decimal: Python would also take `1_000` and the digits of every script.

    Raises:
        OverflowError: a whole number that no float holds.
        ValueError: it is no number; a bool is none.
    """
    if isinstance(value, str):
        text = value.strip(" ")
        if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
            raise ValueError(type(value))
        return float(text)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(type(value))
    return float(value)


def parse_int(value: Any) -> int:
    """Read a whole number, also from `400.0` and `4e2`.

    Raises:
        OverflowError: it is infinite.
        ValueError: it is not whole, or not a number.
    """
    number = parse_float(value)
    if number != int(number):
        raise ValueError(type(value))
    return int(number)


def parse_path(value: Any) -> str | None:
    """Read a path. YAML makes a number of a folder called `2026`.

    Raises:
        ValueError: it is no text, and nothing that stands for one.
    """
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(path, bool) or not isinstance(path, str | int):
        raise ValueError(type(value))
    return str(path)


_LONGEST_NUMBER, _LONGEST_PATH = 64, 4096
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf(inity)?|nan", re.ASCII | re.IGNORECASE)

# By the annotation of the setting: how a value is read, what it is called, and what it then is.
_PARSERS: dict[str, tuple[Callable[[Any], Any], str, Callable[[Any], bool]]] = {
    "str": (parse_word, "a word", lambda value: isinstance(value, str)),
    "str | None": (parse_path, "a path", lambda value: value is None or isinstance(value, str)),
    "float": (parse_float, "a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "int": (parse_int, "a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "bool": (parse_bool, "true or false", lambda value: isinstance(value, bool)),
}


@dataclass(frozen=True)
class Setting:
    """A row of the table of settings.

    Attributes:
        type: the annotation of the field, such as `float`.
        help: what it does; names and values are in backticks.
        group: the heading that it is listed under.
        where: the learners, or the runs, that it applies to.
        default_text: what holds while the setting is not given, where its default value says little.
        check: what else a value has to be.
        aliases: word → the word that it stands for.
    """

    name: str
    type: str
    default: Any
    help: str
    group: str
    where: str
    default_text: str
    check: Check | None
    aliases: dict[str, str]

    @classmethod
    def of(cls, declared: Field[Any]) -> Setting:
        return cls(declared.name, str(declared.type), declared.default, **declared.metadata)

    def parse(self, value: Any) -> Any:
        """Read a value of the setting's type, from a string as well.

        Raises:
            OverflowError, ValueError: the value cannot be read so.
        """
        read = _PARSERS[self.type][0](value)
        return self.aliases.get(read, read) if self.aliases else read

    @property
    def wanted(self) -> str:
        """What a value has to be of, after "give"."""
        return _PARSERS[self.type][1]

    @property
    def values(self) -> str:
        """What a value may be, in Markdown."""
        return self.check.text() if self.check is not None else self.wanted

    def problem(self, value: Any) -> tuple[str, str] | None:
        """Return what is wrong with a value, of any type, and the fix; None if it is good."""
        if not _PARSERS[self.type][2](value):
            return f"not {self.wanted}", f"give {self.wanted}"
        return None if self.check is None else self.check.problem(value, self.default)

    def show(self, value: Any) -> str:
        """Write a value as a user would."""
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float):
            return f"{value:.15g}"
        return "none" if value is None else str(value)


def setting(
    default: Any,
    help: str,
    *,
    group: str,
    where: str = EVERYWHERE,
    check: Check | None = None,
    default_text: str = "",
    aliases: dict[str, str] | None = None,
) -> Any:
    """Declare a setting as a field of a dataclass; the arguments are those of `Setting`."""
    return field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "where": where,
            "default_text": default_text,
            "check": check,
            "aliases": aliases or {},
        },
    )
