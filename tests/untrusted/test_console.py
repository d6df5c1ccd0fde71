"""What a console of ours prints of names and texts of others."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from fp16_patch.untrusted.console import TextConsole

HOSTILE = "run[lr=1e-6] [/b] [link=x]y :smile: \x1b]0;title\x07 \u202e \r\n \0"
SHOWN = r"run[lr=1e-6] [/b] [link=x]y :smile: \x1b]0;title\x07 \u202e \r\n \x00"


def printed(*renderables: object) -> str:
    console = TextConsole(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def a_table(text: str) -> Table:
    table = Table(text, title=text)
    table.add_row(text)
    return table


def test_a_string_is_one_line_of_text() -> None:
    assert printed(HOSTILE) == f"{SHOWN}\n"


def test_titles_headings_and_cells_are_text() -> None:
    assert printed(a_table(HOSTILE)).count(SHOWN) == 3


def test_a_styled_text_has_lines_and_no_control_characters() -> None:
    assert printed(Text("a\nb\x1b[2J")) == "a\nb\\x1b[2J\n"


def test_blanks_that_numbers_have_are_kept() -> None:
    assert printed("12\u202f345\u00a0k") == "12\u202f345\u00a0k\n"


@given(st.text(st.characters(), max_size=30))
def test_nothing_that_is_printed_acts_on_a_terminal(text: str) -> None:
    shown = printed(text, Text(text), a_table(text))
    assert {unicodedata.category(character) for character in shown if not character.isprintable()} <= {"Zs", "Cc"}
    assert {character for character in shown if unicodedata.category(character) == "Cc"} <= {"\n"}


@pytest.mark.parametrize("columns", [None, "44"])
def test_a_table_in_a_file_is_as_wide_as_it_needs_to_be(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert TextConsole(piped_width=160).width == int(columns or 160)
