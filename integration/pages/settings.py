"""Write the tables of the settings page, `fp16_patch/plan/README.md`, from the table of settings.

    python -m integration.pages.settings

A test says whether the page is up to date.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from fp16_patch.plan import settings as table_of_settings
from fp16_patch.plan.setting import Setting
from fp16_patch.plan.settings import SETTINGS
from integration.pages.places import with_table

PAGE = Path(table_of_settings.__file__).with_name("README.md")
PLACE = "settings"


def written() -> str:
    """Return the page as it has to be."""
    return with_table(PAGE.read_text(encoding="utf-8"), tables(), PLACE)


def tables() -> str:
    """Return a Markdown table for each group of settings."""
    groups = groupby(SETTINGS.values(), key=lambda setting: setting.group)
    return "\n".join(f"## {group}\n\n{_HEAD}{''.join(map(_row, settings))}" for group, settings in groups)


_HEAD = "| setting | default | values | | applies to |\n|---|---|---|---|---|\n"


def _row(setting: Setting) -> str:
    default = setting.default_text or f"`{setting.show(setting.default)}`"
    cells = (f"`{setting.name}`", default, setting.values, setting.help, setting.where)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def main() -> None:
    PAGE.write_text(written(), encoding="utf-8")


if __name__ == "__main__":
    main()
