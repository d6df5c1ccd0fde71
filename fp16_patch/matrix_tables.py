"""The matrix of patches and releases in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from fp16_patch.declarations import Patch, Status, Verdict
from fp16_patch.fork import Done, Outcome
from fp16_patch.matrix import known_releases


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
    """All declared patches against all declared releases, a table for each package."""
    by_package: dict[str, list[Patch]] = {}
    for patch in patches:
        by_package.setdefault(patch.package, []).append(patch)
    for package, those in by_package.items():
        releases = known_releases(those)
        table = Table("patch", *releases, title=package)
        for patch in those:
            table.add_row(patch.name, *(_cell(patch, release) for release in releases))
        console.print(table)
    says = (
        f"{_FIXED} fixed here; {_CONTRACT} by contract: tested between stand-ins; {_NOBODY} no: the release is refused"
    )
    console.print(says, highlight=False)


_FIXED, _CONTRACT, _NOBODY = "●", "○", "–"


def _cell(patch: Patch, release: str) -> str:
    if release in patch.releases:
        return f"[green]{_CONTRACT if patch.tested == 'contract' else _FIXED}[/]"
    exemption = patch.exemption_in(release)
    return f"[yellow]{_NOBODY}[/]" if exemption is None else str(exemption).partition(":")[0]
