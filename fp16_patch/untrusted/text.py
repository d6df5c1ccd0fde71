"""Shows names and texts of others as text: without control characters, and in the order of their characters."""

from __future__ import annotations

MOST_SHOWN = 200
"""Characters of a text that a sentence quotes."""


def printable(text: object) -> str:
    r"""Return a text with an escape such as `\x1b` in the place of whatever a terminal or a page would act on.

    That is each character that Unicode does not call printable: controls, line ends, overrides of the direction of
    writing, lone surrogates.
    """
    return "".join(map(_printable_character, str(text)))


def _printable_character(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def quoted(text: object) -> str:
    """Return a text as a sentence quotes it: printable, and its beginning and end where it is long."""
    shown = printable(text)
    return shown if len(shown) <= MOST_SHOWN else f"{shown[: MOST_SHOWN // 2]}…{shown[-MOST_SHOWN // 2 :]}"
