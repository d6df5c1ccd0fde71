"""Tells which patch holds for which release, and adds a release.

The declarations in `patches/` are the data: a patch holds for a release if its target has, in that release, the
fingerprint of one that the patch was written for.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from tokenize import TokenError

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from fp16_patch.patching.declarations import Patch, Status, Variant, Verdict, declared_patches, nearest, patches_dir
from fp16_patch.patching.fingerprint import definition
from fp16_patch.patching.sources import Sources, Tree
from fp16_patch.plan.errors import SourceError
from fp16_patch.releases.wheels import download, newest
from fp16_patch.untrusted.text import quoted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOWNLOADS = 8
"""At a time."""


@dataclass(frozen=True)
class Release:
    """A release of a package, as a requirement names it: `verl==0.9.1`."""

    package: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Release:
        """Read a release as it is typed.

        Args:
            text: a package and one release of it, or a package, which means its newest release.

        Raises:
            SourceError: not a package that we patch, not exactly one release of it, or pip finds none.
        """
        packages = sorted({patch.package for patch in declared_patches()})
        fix = f"give one release of {', '.join(packages)}, such as {packages[-1]}==1.2.3"
        try:
            return cls(*_pinned(text, packages))
        except ValueError as problem:
            raise SourceError(f"{quoted(text)}: {problem}. Fix: {fix}") from problem

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


def _pinned(text: str, packages: Sequence[str]) -> tuple[str, str]:
    """Return package and release of a requirement that says nothing else; extras only bring other packages.

    Raises:
        ValueError: it says more, or something else.
        SourceError: pip finds no release.
    """
    try:
        requirement = Requirement(_COMMENT.sub("", text))
    except InvalidRequirement as problem:
        option = _PIPS_OPTION.search(text)
        raise ValueError("not a requirement" + (f": {option[1]} is an option of pip" if option else "")) from problem
    if requirement.url:
        raise ValueError("a URL names no release; of a source tree, ask `fp16-patch doctor --source FOLDER`")
    if requirement.marker:
        raise ValueError("behind the `;` it says where it holds, and a release is the same everywhere")
    package = canonicalize_name(requirement.name)
    operators = [specifier.operator for specifier in requirement.specifier]
    if package not in packages or operators not in ([], ["=="]):
        raise ValueError("not one release of a patched package")
    if not operators:
        return package, newest(package)
    (specifier,) = requirement.specifier
    return package, str(_version(specifier.version))


# As pip reads a line of requirements.
_COMMENT = re.compile(r"(^|\s+)#.*$")
_PIPS_OPTION = re.compile(r"(?:^|\s)(-[a-zA-Z]\b|--[a-z-]+)")


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion as problem:  # 0.9.*
        raise ValueError("not one release of a patched package") from problem


def known_releases(patches: Iterable[Patch]) -> list[str]:
    """List every release that one of the patches names, oldest first."""
    return sorted({release for patch in patches for release in patch.releases}, key=Version)


def tested_levels() -> dict[Release, str]:
    """Tell how far each declared release of a framework is tested: `fingerprint`, `worker` or `end to end`.

    From the file that drives the tests themselves; an installed package has a copy of it.
    """
    inside = Path(__file__).parents[1] / "versions.toml"
    path = inside if inside.is_file() else Path(__file__).parents[2] / "integration" / "matrix" / "versions.toml"
    declared = tomllib.loads(path.read_text(encoding="utf-8"))["releases"]
    return {
        Release(package, version): cell["level"]
        for package, releases in declared.items()
        for version, cell in releases.items()
    }


def check(sources: Sources, patches: Iterable[Patch], release: str | None) -> list[Verdict]:
    """Compare the targets there with those that the patches were written for; imports nothing."""
    return [_judge(patch, sources, release) for patch in patches]


def _judge(patch: Patch, sources: Sources, release: str | None) -> Verdict:
    try:
        return patch.judge(sources, release)
    except (SyntaxError, TokenError) as problem:
        raise SourceError(f"{patch.variants[0].target}: its code cannot be compared: {problem}") from problem


def check_releases(releases: Sequence[Release]) -> list[list[Verdict]]:
    """Check releases that pip downloads, several at a time, and does not install.

    Raises:
        SourceError: pip finds no wheel of one.
    """
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        return list(pool.map(_check_release, releases))


def _check_release(release: Release) -> list[Verdict]:
    with TemporaryDirectory() as folder:
        wheel = download(release.package, release.version, Path(folder))
        return check(wheel, _of(release.package), release.version)


def check_tree(path: Path) -> list[Verdict]:
    """Check the packages of which a source tree holds something that is patched.

    Raises:
        SourceError: there is no such directory, or nothing in it is patched.
    """
    verdicts = check(Tree(path), declared_patches(), None)
    packages = {verdict.patch.package for verdict in verdicts if verdict.fingerprint is not None}
    if not packages:
        known = ", ".join(sorted({verdict.patch.package for verdict in verdicts}))
        raise SourceError(f"{path}: holds no code that is patched, of {known}. Fix: name the directory these lie in")
    return _excused([verdict for verdict in verdicts if verdict.patch.package in packages])


def _excused(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Excuse what a tree lacks, if the release that most of the tree is like does without it."""
    like = {package: _most_like(verdicts, package) for package in {verdict.patch.package for verdict in verdicts}}
    return [
        replace(verdict, status=Status.EXEMPT, exemption=exemption)
        if verdict.unknown and (exemption := verdict.patch.exemption_in(like[verdict.patch.package]))
        else verdict
        for verdict in verdicts
    ]


def _most_like(verdicts: Iterable[Verdict], package: str) -> str | None:
    of_it = [verdict for verdict in verdicts if verdict.patch.package == package]
    same = {
        release: sum(verdict.variant.releases.get(release) == verdict.fingerprint for verdict in of_it)
        for release in known_releases(verdict.patch for verdict in of_it)
    }
    return max(reversed(same), key=lambda release: same[release], default=None)


def covered(verdicts: Iterable[Verdict]) -> bool:
    """Return whether every patch applies or is not needed."""
    return not any(verdict.unknown for verdict in verdicts)


def add_release(release: Release) -> tuple[list[Verdict], dict[str, str]]:
    """Declare a release for the patches that hold for it.

    Returns:
        the verdicts, and for each patch whose target changed what changed in it since the nearest known release: a
        unified diff, for a person to look at.

    Raises:
        SourceError: pip finds no wheel, or the declarations are those of an installed package, which are not to be
            written to.
    """
    if patches_dir().parent == Path(__file__).parents[1]:
        raise SourceError(f"{release}: this is an installed package. Fix: add releases in a checkout of fp16_patch")
    with TemporaryDirectory() as folder:
        new = download(release.package, release.version, Path(folder) / release.version)
        verdicts = check(new, _of(release.package), release.version)
        diffs = _differences(verdicts, release, new, Path(folder))
    for verdict in verdicts:
        if verdict.status is Status.APPLIES and release.version not in verdict.patch.releases:
            declare(verdict, release.version)
    return verdicts, diffs


def _differences(verdicts: Sequence[Verdict], release: Release, new: Sources, folder: Path) -> dict[str, str]:
    changed = [verdict for verdict in verdicts if verdict.status is Status.CHANGED and verdict.variant.releases]
    former = {verdict.patch.name: str(nearest(verdict.variant.releases, release.version)) for verdict in changed}
    known = {version: download(release.package, version, folder / version) for version in set(former.values())}
    return {
        name: difference(verdict.variant, (former[name], known[former[name]]), (release.version, new))
        for verdict in changed
        if (name := verdict.patch.name)
    }


def difference(variant: Variant, old: tuple[str, Sources], new: tuple[str, Sources]) -> str:
    """Return what differs in the target between two named sources, as a unified diff."""
    before, after = (_lines(variant, sources) for _, sources in (old, new))
    names = [f"{variant.target} {name}" for name, _ in (old, new)]
    return "\n".join(difflib.unified_diff(before, after, names[0], names[1], lineterm=""))


def _lines(variant: Variant, sources: Sources) -> list[str]:
    return (definition(sources.read(variant.module) or "", variant.qualname) or "").splitlines()


def declare(verdict: Verdict, version: str) -> None:
    """Write a release and its fingerprint into the table of the variant that the verdict names, oldest first."""
    patch, index = verdict.patch, verdict.patch.variants.index(verdict.variant)
    path = patches_dir() / patch.framework / f"{patch.name}.toml"
    parts = _RELEASES.split(path.read_text(encoding="utf-8"))
    # A part is what stands between two such tables: the lines of the former, and what comes next.
    header, body = parts[2 * index + 1], parts[2 * index + 2]
    rows = _ROWS.match(body)
    rest = body[rows.end() :] if rows else body
    releases = sorted((verdict.variant.releases | {version: str(verdict.fingerprint)}).items(), key=_by_release)
    lines = "".join(f'"{name}" = "{value}"\n' for name, value in releases)
    parts[2 * index + 1 : 2 * index + 3] = [header, lines + rest]
    path.write_text("".join(parts), encoding="utf-8")


_RELEASES = re.compile(r"(^\[(?:variant\.)?releases\]\n)", re.MULTILINE)
_ROWS = re.compile(r'(?:".*\n)*')


def _by_release(item: tuple[str, str]) -> Version:
    return Version(item[0])


def _of(package: str) -> Sequence[Patch]:
    return [patch for patch in declared_patches() if patch.package == package]
