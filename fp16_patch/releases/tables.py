"""The matrix of patches and releases in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from fp16_patch.patching.declarations import NoThread, Patch, Reason, Status, Verdict
from fp16_patch.releases.matrix import Release, known_releases, tested_levels
from fp16_patch.releases.tree_diff import Done, Outcome
from fp16_patch.untrusted.text import printable

T = TypeVar("T")
Cell = tuple[str, str]
"""A sign and its colour."""


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
        console.print(Text.assemble(("not needed", "green"), f", {printable(why)}"))
        console.print(Padding(", ".join(names), (0, 0, 1, 4)))
    _print_counts(title, [verdict.status for verdict in verdicts], _COUNTED, console)


_COUNTED = {
    Status.APPLIES: "hold",
    Status.EXEMPT: "are not needed",
    Status.CHANGED: "have a target that changed",
    Status.MISSING: "have a target that is not there",
}


def _says(verdict: Verdict) -> Text:
    if verdict.status is Status.APPLIES:
        return Text(f"as in {verdict.like}", "green")
    fingerprint = f" ({verdict.fingerprint})" if verdict.fingerprint else ""
    return Text.assemble((f"{verdict.status.value}{fingerprint}", "red"), f" {verdict.variant.target}")


def print_outcomes(title: str, outcomes: Sequence[Outcome], console: Console) -> None:
    """Print what a diff for a source tree does of each patch, and what is lost without fp16_patch."""
    table = _table_of_patches(title)
    table.add_column("what becomes of it")
    table.add_column("what is lost, and why", overflow="fold")
    for done in Done:
        for outcome in (each for each in outcomes if each.done is done):
            table.add_row(outcome.verdict.patch.name, Text(done.value, _COLOURS[done]), outcome.text)
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
    console.print(f"{title}: of {len(found)} patches, {counts}")


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
        title = Text.assemble((package, "bold"), f", upstream {repository}" if repository else "")
        for line in (title, *_matrix(package, those, repository), ""):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
    console.print(_legend())


def _matrix(package: str, patches: Sequence[Patch], repository: str | None) -> Iterator[Text]:
    levels = tested_levels()
    columns = {
        release: [_cell(patch, release, levels.get(Release(package, release))) for patch in patches]
        for release in known_releases(patches)
    }
    alike = [(cells, [*releases]) for cells, releases in groupby(columns, columns.__getitem__)]
    width = max(len(patch.name) for patch in patches)
    for index, (_, releases) in enumerate(alike):
        heading = " – ".join(dict.fromkeys((releases[0], releases[-1])))
        yield Text.assemble(f"{'':{width}}  ", *[_STAIR] * index, heading)
    yield Text.assemble(f"{'patch':{width}}  ", *[_STAIR] * len(alike), "upstream")
    for patch, *cells in zip(patches, *(cells for cells, _ in alike), strict=True):
        shown = Text("  ").join([*(Text(*cell) for cell in cells), _upstream(patch, repository)])
        yield Text.assemble(f"{patch.name:{width}}  ", shown)


_STAIR = Text.assemble(("│", "dim"), "  ")


def _repository(patches: Iterable[Patch]) -> str | None:
    """Return the repository that most threads about the patches are in."""
    named = [thread.partition("#")[0] for patch in patches for thread in patch.threads]
    return max(named, key=named.count, default=None)


def _upstream(patch: Patch, repository: str | None = None) -> Text:
    """Link the framework's threads about the defect; those of `repository` by their number alone."""
    if isinstance(patch.upstream, NoThread):
        return Text(patch.upstream.value, "dim")
    shown = []
    for thread in patch.upstream:
        there, _, number = thread.partition("#")
        name = "" if there == repository else there.rpartition("/")[2]
        shown.append(Text(f"{name}#{number}", f"link https://github.com/{there}/issues/{number}"))
        repository = there
    return Text(", ").join(shown)


_TESTED = {"end to end": "E", "worker": "W", "contract": "C", "fingerprint": "F", None: "●"}
_EXEMPT = {
    Reason.FIXED_BY: ("↑", "green"),
    Reason.NATIVE: ("=", "green"),
    Reason.UNAFFECTED: ("·", "dim"),
    Reason.REFUSED: ("✕", "yellow"),
}
_NOBODY = ("?", "red")
_LEGEND_TEXT = """\
Fixed here, and how far the release is tested: E end to end, W its workers on
several ranks, F its code is compared; C by contract: what runs does not reach
it, its own code runs between stand-ins; ● no framework's package
↑ fixed by another patch   = native: the release does it right
· has nothing that could go wrong
✕ settings that need it stop the run   ? nobody looked: the release is refused
Upstream: the framework's issues and pull requests about the defect; ours: the
patch watches or checks a run, and nothing in the framework is wrong
Why a patch is not needed: fp16-patch matrix --check PACKAGE==RELEASE"""


def _legend() -> Text:
    """Return the legend, its signs in the colours that they have in the matrix."""
    legend = Text(_LEGEND_TEXT)
    for sign, colour in (*_EXEMPT.values(), _NOBODY):
        at = _LEGEND_TEXT.index(f"{sign} ")
        legend.stylize(colour, at, at + 1)
    return legend


def _cell(patch: Patch, release: str, level: str | None) -> Cell:
    if release in patch.releases:
        return _TESTED[patch.tested_in(release) or level], "green"
    exemption = patch.exemption_in(release)
    return _NOBODY if exemption is None else _EXEMPT[exemption.reason]
