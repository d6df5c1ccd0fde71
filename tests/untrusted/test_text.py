"""Names and texts of others reach terminals and pages as text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch.untrusted.text import MOST_SHOWN, printable, quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run[lr=1e-6] [b]", "run[lr=1e-6] [b]"),
        ("π über 行", "π über 行"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\rc\0", r"a\nb\rc\x00"),
        ("abc\u202ecba", r"abc\u202ecba"),
        ("\udc80", r"\udc80"),
    ],
)
def test_what_a_terminal_would_act_on_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_any_text_becomes_printable_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert all(unicodedata.category(character) == "Zs" or character.isprintable() for character in shown)
    shown.encode("utf-8")


def test_a_sentence_quotes_the_ends_of_a_long_text() -> None:
    assert quoted("short") == "short"
    shown = quoted("a" * 5000 + "z")
    assert len(shown) == MOST_SHOWN + 1
    assert shown.startswith("aaa")
    assert shown.endswith("aaz")
