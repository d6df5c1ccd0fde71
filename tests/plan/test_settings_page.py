"""The settings page follows from the table of settings."""

from __future__ import annotations

import re

from fp16_patch.plan.settings import SETTINGS
from integration.pages.settings import PAGE, tables, written


def test_the_page_lists_every_setting() -> None:
    assert tables() in PAGE.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", tables(), re.MULTILINE)
    assert listed == list(SETTINGS)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == written(), "run python -m integration.pages.settings"
