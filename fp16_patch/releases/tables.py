"""The matrix of patches and releases in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from string import ascii_lowercase

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.syntax import Syntax
from rich.table import Table

from fp16_patch.patching.declarations import Patch, Reason, Status, Verdict
from fp16_patch.releases.matrix import Release, known_releases, tested_levels
from fp16_patch.releases.tree_diff import Done, Outcome


def print_verdicts(title: str, verdicts: Sequence[Verdict], console: Console) -> None:
    """One release: what each patch's target is in it, and at the end how many hold."""
    table = Table("patch", "", "target", title=title)
    for verdict in verdicts:
        table.add_row(verdict.patch.name, _says(verdict), verdict.variant.target)
    console.print(table)
    counted = {status: sum(verdict.status is status for verdict in verdicts) for status in Status}
    counts = ", ".join(f"{count} {_COUNTED[status]}" for status, count in counted.items() if count)
    console.print(f"{title}: of {len(verdicts)} patches, {counts}", highlight=False)


_COUNTED = {
    Status.APPLIES: "hold",
    Status.EXEMPT: "are not needed",
    Status.CHANGED: "have a target that changed",
    Status.MISSING: "have a target that is not there",
}


def _says(verdict: Verdict) -> str:
    if verdict.status is Status.APPLIES:
        return f"[green]as in {verdict.like}[/]"
    if verdict.status is Status.EXEMPT:
        return f"[green]{verdict.exemption}[/]"
    fingerprint = f" ({verdict.fingerprint})" if verdict.fingerprint else ""
    return f"[red]{verdict.status.value}{fingerprint}[/]"


def print_outcomes(title: str, outcomes: Sequence[Outcome], console: Console) -> None:
    """A source tree to be edited: what the diff does of each patch, and what is lost without fp16_patch."""
    table = Table("patch", "", "", title=title)
    for done in Done:
        for outcome in (each for each in outcomes if each.done is done):
            table.add_row(outcome.verdict.patch.name, f"[{_COLOURS[done]}]{done.value}[/]", outcome.text)
    console.print(table)
    counted = {done: sum(outcome.done is done for outcome in outcomes) for done in Done}
    counts = ", ".join(f"{count} {done.value}" for done, count in counted.items() if count)
    console.print(f"{title}: of {len(outcomes)} patches, {counts}", highlight=False)


_COLOURS = {
    Done.EDITED: "green",
    Done.UNKNOWN: "red",
    Done.UNWRITTEN: "red",
    Done.LOADED: "yellow",
    Done.NEEDLESS: "green",
}


def print_diffs(diffs: Mapping[str, str], console: Console) -> None:
    """What changed in the targets of patches that do not hold."""
    for name, text in diffs.items():
        console.rule(f"{name}: to be looked at by a person")
        console.print(Syntax(text, "diff", background_color="default", word_wrap=True))


def print_matrix(patches: Iterable[Patch], console: Console) -> None:
    """All declared patches against all declared releases, a table for each package.

    Neighbouring releases of which the same is to be said share a column.
    """
    by_package: dict[str, list[Patch]] = {}
    for patch in patches:
        by_package.setdefault(patch.package, []).append(patch)
    for package, those in by_package.items():
        _print_package(package, those, console)
    console.print(_LEGEND, highlight=False)


def _print_package(package: str, patches: Sequence[Patch], console: Console) -> None:
    levels = tested_levels()
    columns = {
        release: [_cell(patch, release, levels.get(Release(package, release))) for patch in patches]
        for release in known_releases(patches)
    }
    alike = [(cells, [*releases]) for cells, releases in groupby(columns, columns.__getitem__)]
    headings = ["\n–\n".join(dict.fromkeys((releases[0], releases[-1]))) for _, releases in alike]
    table = _matrix(package, patches, headings, [cells for cells, _ in alike])
    if Measurement.get(console, console.options.update(max_width=_UNBOUNDED), table).maximum <= console.width:
        console.print(table)
        return
    # Release names do not fit in a narrow terminal: the columns have letters there.
    letters = ascii_lowercase[: len(headings)]
    console.print(_matrix(package, patches, letters, [cells for cells, _ in alike]))
    named = (f"{letter} {heading.replace(chr(10), ' ')}" for letter, heading in zip(letters, headings, strict=True))
    console.print("   ".join(named) + "\n", highlight=False)


def _matrix(package: str, patches: Sequence[Patch], headings: Sequence[str], columns: Sequence[Sequence[str]]) -> Table:
    table = Table(title=package, title_justify="left", box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("patch", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="center", no_wrap=True)
    for patch, *cells in zip(patches, *columns, strict=True):
        table.add_row(patch.name, *cells)
    return table


_UNBOUNDED = 10_000
_TESTED = {"end to end": "E", "worker": "W", "contract": "C", "fingerprint": "F", None: "●"}
_EXEMPT = {
    Reason.FIXED_BY: "[green]↑[/]",
    Reason.NATIVE: "[green]=[/]",
    Reason.UNAFFECTED: "[dim]·[/]",
    Reason.REFUSED: "[yellow]✕[/]",
}
_NOBODY = "[red]?[/]"
_LEGEND = f"""\
Fixed here, and how far the release is tested: E end to end, W its workers on several ranks, F its code is compared;
C by contract: cannot run in the tests, the function's own code runs between stand-ins; ● no framework's package
{_EXEMPT[Reason.FIXED_BY]} fixed by another patch   {_EXEMPT[Reason.NATIVE]} native: the release does it right   \
{_EXEMPT[Reason.UNAFFECTED]} has nothing that could go wrong
{_EXEMPT[Reason.REFUSED]} settings that need it stop the run   {_NOBODY} nobody looked: the release is refused
Why a patch is not needed: fp16-patch matrix --check PACKAGE==RELEASE"""


def _cell(patch: Patch, release: str, level: str | None) -> str:
    if release in patch.releases:
        return f"[green]{_TESTED[patch.tested or level]}[/]"
    exemption = patch.exemption_in(release)
    return _NOBODY if exemption is None else _EXEMPT[exemption.reason]
