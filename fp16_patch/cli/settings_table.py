"""The settings in force, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fp16_patch.plan.in_force import DEFAULT, SettingInForce
from fp16_patch.untrusted.text import printable

_FOOTNOTE = "set one by FP16_PATCH_<SETTING>=…; `fp16-patch settings --verbose` says what each means"


def print_settings(settings: Sequence[SettingInForce], console: Console) -> None:
    """Print a row for each, under the heading of its group; what was set stands out."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("setting", "value", "default", "from"):
        table.add_column(heading, overflow="fold")
    for group, members in groupby(settings, key=lambda each: each.setting.group):
        table.add_row()
        table.add_row(Text(group, style="underline"))
        for each in members:
            table.add_row(*_cells(each), style="" if each.origin == DEFAULT else "bold")
    console.print(table)
    console.print()
    console.print(_FOOTNOTE, style="dim")


def print_meanings(settings: Sequence[SettingInForce], console: Console) -> None:
    """Print a paragraph for each: the value and its origin, what it means, what it may be and where it applies."""
    for each in settings:
        name, value, default, origin = _cells(each)
        came_from = origin if origin == DEFAULT else f"from {origin}; default {default}"
        console.print(Text.assemble((f"{name} = {value}", "bold"), f"  ({came_from})"))
        setting = each.setting
        unset = [f"Unset: {setting.default_text}."] if setting.default_text else []
        sentences = (f"{setting.help}.", f"Values: {setting.values}.", *unset, f"Applies to: {setting.where}.")
        console.print(Padding(Text(" ".join(sentences).replace("`", "")), (0, 0, 1, 4)))


def _cells(each: SettingInForce) -> tuple[str, str, str, str]:
    setting = each.setting
    return setting.name, printable(setting.show(each.value)), setting.show(setting.default), printable(each.origin)
