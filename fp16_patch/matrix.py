"""Which patch holds for which release, and how a release is added.

The declarations in `patches/` are the data: a patch holds for a release if its target has, in that release, the
fingerprint of one that the patch was written for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from fp16_patch.errors import SourceError
from fp16_patch.fingerprint import definition
from fp16_patch.patching import Patch, PatchSet, patches_dir
from fp16_patch.sources import Sources, Tree
from fp16_patch.wheels import download

DOWNLOADS = 8
"""At a time."""


class Holds(str, Enum):
    """What a patch's target is in some release."""

    YES = "holds"
    CHANGED = "changed"
    ABSENT = "absent"


@dataclass(frozen=True)
class Cell:
    """One patch against one release, or one source tree.

    Attributes:
        like: a release, the newest there is, in which the target is the same; None unless the patch holds.
    """

    patch: Patch
    holds: Holds
    fingerprint: str | None
    like: str | None


@dataclass(frozen=True)
class Release:
    """A release of a package, as a requirement names it: `verl==0.9.1`."""

    package: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Release:
        """
        Raises:
            SourceError: not a package that we patch, or not exactly one release of it.
        """
        packages = sorted({patch.package for patch in declared()})
        fix = f"give one release of {', '.join(packages)}, such as {packages[-1]}==1.2.3"
        try:
            requirement = Requirement(text)
        except InvalidRequirement as problem:
            raise SourceError(f"{text}: not a requirement. Fix: {fix}") from problem
        pinned = [specifier.version for specifier in requirement.specifier if specifier.operator == "=="]
        if requirement.name not in packages or len(pinned) != 1 or len(requirement.specifier) != 1:
            raise SourceError(f"{text}: not one release of a patched package. Fix: {fix}")
        return cls(requirement.name, pinned[0])

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


def declared() -> tuple[Patch, ...]:
    return PatchSet.declared(changes=True, strict=False).patches


def known_releases(patches: Iterable[Patch]) -> list[str]:
    """Every release that one of the patches names, oldest first."""
    return sorted({release for patch in patches for release in patch.releases}, key=Version)


def check(sources: Sources, patches: Iterable[Patch]) -> list[Cell]:
    """Compare the targets there with those that the patches were written for; imports nothing."""
    return [_cell(sources, patch) for patch in patches]


def check_releases(releases: Sequence[Release]) -> list[list[Cell]]:
    """The same for releases that pip downloads, several at a time, and does not install.

    Raises:
        SourceError: pip finds no wheel of one.
    """
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        return list(pool.map(_check_release, releases))


def _check_release(release: Release) -> list[Cell]:
    with TemporaryDirectory() as folder:
        return check(download(release.package, release.version, Path(folder)), _of(release.package))


def check_tree(path: Path) -> list[Cell]:
    """The same for the packages of which a source tree holds something that is patched.

    Raises:
        SourceError: there is no such directory, or nothing in it is patched.
    """
    cells = check(Tree(path), declared())
    packages = {cell.patch.package for cell in cells if cell.holds is not Holds.ABSENT}
    if not packages:
        known = ", ".join(sorted({cell.patch.package for cell in cells}))
        raise SourceError(f"{path}: holds no code that is patched, of {known}. Fix: name the directory these lie in")
    return [cell for cell in cells if cell.patch.package in packages]


def all_hold(cells: Iterable[Cell]) -> bool:
    return all(cell.holds is Holds.YES for cell in cells)


def add_release(release: Release) -> tuple[list[Cell], dict[str, str]]:
    """Declare a release for the patches that hold for it.

    Returns:
        the cells, and for each patch whose target changed what changed in it since the nearest release that is known:
        a unified diff, for a person to look at.

    Raises:
        SourceError: pip finds no wheel, or the declarations are those of an installed package, which are not to be
            written to.
    """
    if patches_dir().parent == Path(__file__).parent:
        raise SourceError(f"{release}: this is an installed package. Fix: add releases in a checkout of fp16_patch")
    with TemporaryDirectory() as folder:
        new = download(release.package, release.version, Path(folder) / release.version)
        cells = check(new, _of(release.package))
        diffs = _differences([cell.patch for cell in cells if cell.holds is Holds.CHANGED], release, new, Path(folder))
    for cell in cells:
        if cell.holds is Holds.YES and release.version not in cell.patch.releases:
            declare(cell.patch, release.version, str(cell.fingerprint))
    return cells, diffs


def _differences(changed: Sequence[Patch], release: Release, new: Sources, folder: Path) -> dict[str, str]:
    former = {patch.name: nearest(patch, release.version) for patch in changed}
    known = {version: download(release.package, version, folder / version) for version in set(former.values())}
    return {
        patch.name: difference(patch, (former[patch.name], known[former[patch.name]]), (release.version, new))
        for patch in changed
    }


def nearest(patch: Patch, version: str) -> str:
    """The newest known release before this one, else the oldest after it."""
    known = known_releases([patch])
    before = [release for release in known if Version(release) <= Version(version)]
    return before[-1] if before else known[0]


def difference(patch: Patch, old: tuple[str, Sources], new: tuple[str, Sources]) -> str:
    """What differs in the target between two named sources, as a unified diff."""
    before, after = (_lines(patch, sources) for _, sources in (old, new))
    names = [f"{patch.target} {name}" for name, _ in (old, new)]
    return "\n".join(difflib.unified_diff(before, after, names[0], names[1], lineterm=""))


def _lines(patch: Patch, sources: Sources) -> list[str]:
    return (definition(sources.read(patch.module) or "", patch.qualname) or "").splitlines()


def declare(patch: Patch, version: str, fingerprint: str) -> None:
    """Write a release into the patch's file, in the order of releases; `[releases]` is the last table in it."""
    path = patches_dir() / patch.framework / f"{patch.name}.toml"
    head, table, _ = path.read_text(encoding="utf-8").partition("[releases]\n")
    releases = sorted((patch.releases | {version: fingerprint}).items(), key=lambda item: Version(item[0]))
    lines = "".join(f'"{name}" = "{value}"\n' for name, value in releases)
    path.write_text(f"{head}{table}{lines}", encoding="utf-8")


def _of(package: str) -> Sequence[Patch]:
    return [patch for patch in declared() if patch.package == package]


def _cell(sources: Sources, patch: Patch) -> Cell:
    found = patch.fingerprint_in(sources)
    if found is None:
        return Cell(patch, Holds.ABSENT, None, None)
    same = [release for release in known_releases([patch]) if patch.releases[release] == found]
    return Cell(patch, Holds.YES if same else Holds.CHANGED, found, same[-1] if same else None)
