"""Shows names and texts of others as text: without control characters, and in the order of their characters."""

from __future__ import annotations

import unicodedata

MOST_SHOWN = 200
"""Characters of a text that a sentence quotes."""


def printable(text: object) -> str:
    r"""Return a text with an escape such as `\x1b` in the place of whatever a terminal or a page would act on.

    That is each character that is neither a blank nor one that Unicode calls printable: controls, line ends, overrides
    of the direction of writing, lone surrogates.
    """
    shown = str(text)
    return shown if shown.isprintable() else "".join(map(_printable_character, shown))


def printable_lines(text: object) -> str:
    """Return the same, with the ends of lines as they are."""
    return "\n".join(map(printable, str(text).split("\n")))


def _printable_character(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def quoted(text: object) -> str:
    """Return a text as a sentence quotes it: printable, and its beginning and end where it is long."""
    shown = printable(text)
    return shown if len(shown) <= MOST_SHOWN else f"{shown[: MOST_SHOWN // 2]}…{shown[-MOST_SHOWN // 2 :]}"
