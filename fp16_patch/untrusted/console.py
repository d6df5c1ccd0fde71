"""The terminal, on which texts of others are shown as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fp16_patch.untrusted.text import printable, printable_lines


class TextConsole(Console):
    r"""Prints strings as one line of text, also those in tables: brackets are brackets, and a line end is a `\n`.

    What has several lines, or a style, is a `Text`; its control characters are escaped, too.

    Args:
        piped_width: columns where the output is no terminal and nobody set COLUMNS; rich's own if None.
        settings: those of rich's `Console`.
    """

    def __init__(self, *, piped_width: int | None = None, **settings: Any) -> None:
        if piped_width is not None and "COLUMNS" not in os.environ and not _is_terminal():
            settings["width"] = piped_width
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text
            # What moves the cursor is rich's own.
            is_text = not segment.control and not text.isprintable()
            yield Segment(printable_lines(text), segment.style) if is_text else segment


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()
