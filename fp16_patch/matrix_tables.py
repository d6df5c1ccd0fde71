"""The matrix of patches and releases in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from fp16_patch.matrix import Cell, Holds, known_releases
from fp16_patch.patching import Patch

_SAYS = {Holds.CHANGED: "[red]changed[/]", Holds.ABSENT: "[yellow]not there[/]"}


def print_cells(title: str, cells: Sequence[Cell], console: Console) -> None:
    """One release: what each patch's target is in it, and at the end how many hold."""
    table = Table("patch", "", "target", title=title)
    for cell in cells:
        says = f"[green]as in {cell.like}[/]" if cell.holds is Holds.YES else _SAYS[cell.holds]
        table.add_row(cell.patch.name, says, cell.patch.target)
    console.print(table)
    holding = sum(cell.holds is Holds.YES for cell in cells)
    console.print(f"{title}: {holding} of {len(cells)} patches hold", highlight=False)


def print_diffs(diffs: Mapping[str, str], console: Console) -> None:
    """What changed in the targets of patches that do not hold."""
    for name, text in diffs.items():
        console.rule(f"{name}: to be looked at by a person")
        console.print(Syntax(text, "diff", background_color="default", word_wrap=True))


def print_matrix(patches: Iterable[Patch], console: Console) -> None:
    """All declared patches against all declared releases, a table for each package."""
    by_package: dict[str, list[Patch]] = {}
    for patch in patches:
        by_package.setdefault(patch.package, []).append(patch)
    for package, those in by_package.items():
        releases = known_releases(those)
        table = Table("patch", *releases, title=package)
        for patch in those:
            table.add_row(patch.name, *("yes" if release in patch.releases else "" for release in releases))
        console.print(table)
