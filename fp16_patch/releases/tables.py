"""The matrix of patches and releases in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table

from fp16_patch.patching.declarations import NoThread, Patch, Reason, Status, Verdict
from fp16_patch.releases.matrix import Release, known_releases, tested_levels
from fp16_patch.releases.tree_diff import Done, Outcome

T = TypeVar("T")


def print_verdicts(title: str, verdicts: Sequence[Verdict], console: Console) -> None:
    """Print, for one release, whether each patch holds, which patches it does without, and how many hold."""
    table = _table_of_patches(title)
    table.add_column("its code", overflow="fold")
    table.add_column("upstream", overflow="fold")
    needless: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.exemption is None:
            table.add_row(verdict.patch.name, _says(verdict), _upstream(verdict.patch))
        else:
            needless.setdefault(str(verdict.exemption), []).append(verdict.patch.name)
    console.print(table)
    for why, names in needless.items():
        console.print(f"[green]not needed[/], {escape(why)}", highlight=False)
        console.print(Padding(", ".join(names), (0, 0, 1, 4)), highlight=False)
    _print_counts(title, [verdict.status for verdict in verdicts], _COUNTED, console)


_COUNTED = {
    Status.APPLIES: "hold",
    Status.EXEMPT: "are not needed",
    Status.CHANGED: "have a target that changed",
    Status.MISSING: "have a target that is not there",
}


def _says(verdict: Verdict) -> str:
    if verdict.status is Status.APPLIES:
        return f"[green]as in {verdict.like}[/]"
    fingerprint = f" ({verdict.fingerprint})" if verdict.fingerprint else ""
    return f"[red]{verdict.status.value}{fingerprint}[/] {verdict.variant.target}"


def print_outcomes(title: str, outcomes: Sequence[Outcome], console: Console) -> None:
    """Print what a diff for a source tree does of each patch, and what is lost without fp16_patch."""
    table = _table_of_patches(title)
    table.add_column("what becomes of it")
    table.add_column("what is lost, and why", overflow="fold")
    for done in Done:
        for outcome in (each for each in outcomes if each.done is done):
            table.add_row(outcome.verdict.patch.name, f"[{_COLOURS[done]}]{done.value}[/]", outcome.text)
    console.print(table)
    _print_counts(title, [outcome.done for outcome in outcomes], {done: done.value for done in Done}, console)


_COLOURS = {
    Done.EDITED: "green",
    Done.UNKNOWN: "red",
    Done.UNWRITTEN: "red",
    Done.LOADED: "yellow",
    Done.NEEDLESS: "green",
}


def _table_of_patches(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("patch", no_wrap=True)
    return table


def _print_counts(title: str, found: Sequence[T], words: Mapping[T, str], console: Console) -> None:
    """Print how many patches each word holds for, in the order of the words."""
    counts = ", ".join(f"{count} {word}" for kind, word in words.items() if (count := found.count(kind)))
    console.print(f"{title}: of {len(found)} patches, {counts}", highlight=False)


def print_diffs(diffs: Mapping[str, str], console: Console) -> None:
    """Print what changed in the targets of patches that do not hold."""
    for name, text in diffs.items():
        console.rule(f"{name}: to be looked at by a person")
        console.print(Syntax(text, "diff", background_color="default", word_wrap=True))


def print_matrix(patches: Iterable[Patch], console: Console) -> None:
    """Print all declared patches against all declared releases, package by package, in 80 columns.

    Neighbouring releases of which the same is to be said share a column. Headings stand like stairs above the columns,
    each as long as it is.
    """
    by_package: dict[str, list[Patch]] = {}
    for patch in patches:
        by_package.setdefault(patch.package, []).append(patch)
    for package, those in by_package.items():
        repository = _repository(those)
        title = f"[bold]{package}[/]" + (f", upstream {repository}" if repository else "")
        for line in (title, *_matrix(package, those, repository), ""):
            console.print(line, highlight=False, no_wrap=True, overflow="ignore", crop=False)
    console.print(_LEGEND, highlight=False)


def _matrix(package: str, patches: Sequence[Patch], repository: str | None) -> Iterator[str]:
    levels = tested_levels()
    columns = {
        release: [_cell(patch, release, levels.get(Release(package, release))) for patch in patches]
        for release in known_releases(patches)
    }
    alike = [(cells, [*releases]) for cells, releases in groupby(columns, columns.__getitem__)]
    width = max(len(patch.name) for patch in patches)
    for index, (_, releases) in enumerate(alike):
        heading = " – ".join(dict.fromkeys((releases[0], releases[-1])))
        yield f"{'':{width}}  {_STAIR * index}{heading}"
    yield f"{'patch':{width}}  {_STAIR * len(alike)}upstream"
    for patch, *cells in zip(patches, *(cells for cells, _ in alike), strict=True):
        yield f"{patch.name:{width}}  {'  '.join([*cells, _upstream(patch, repository)])}"


_STAIR = "[dim]│[/]  "


def _repository(patches: Iterable[Patch]) -> str | None:
    """Return the repository that most threads about the patches are in."""
    named = [thread.partition("#")[0] for patch in patches for thread in patch.threads]
    return max(named, key=named.count, default=None)


def _upstream(patch: Patch, repository: str | None = None) -> str:
    """Link the framework's threads about the defect; those of `repository` by their number alone."""
    if isinstance(patch.upstream, NoThread):
        return f"[dim]{patch.upstream.value}[/]"
    shown = []
    for thread in patch.upstream:
        there, _, number = thread.partition("#")
        name = "" if there == repository else there.rpartition("/")[2]
        shown.append(f"[link=https://github.com/{there}/issues/{number}]{name}#{number}[/link]")
        repository = there
    return ", ".join(shown)


_TESTED = {"end to end": "E", "worker": "W", "contract": "C", "fingerprint": "F", None: "●"}
_EXEMPT = {
    Reason.FIXED_BY: "[green]↑[/]",
    Reason.NATIVE: "[green]=[/]",
    Reason.UNAFFECTED: "[dim]·[/]",
    Reason.REFUSED: "[yellow]✕[/]",
}
_NOBODY = "[red]?[/]"
_LEGEND = f"""\
Fixed here, and how far the release is tested: E end to end, W its workers on
several ranks, F its code is compared; C by contract: cannot run in the tests,
the function's own code runs between stand-ins; ● no framework's package
{_EXEMPT[Reason.FIXED_BY]} fixed by another patch   {_EXEMPT[Reason.NATIVE]} native: the release does it right
{_EXEMPT[Reason.UNAFFECTED]} has nothing that could go wrong
{_EXEMPT[Reason.REFUSED]} settings that need it stop the run   {_NOBODY} nobody looked: the release is refused
Upstream: the framework's issues and pull requests about the defect; ours: the
patch watches or checks a run, and nothing in the framework is wrong
Why a patch is not needed: fp16-patch matrix --check PACKAGE==RELEASE"""


def _cell(patch: Patch, release: str, level: str | None) -> str:
    if release in patch.releases:
        return f"[green]{_TESTED[patch.tested or level]}[/]"
    exemption = patch.exemption_in(release)
    return _NOBODY if exemption is None else _EXEMPT[exemption.reason]
