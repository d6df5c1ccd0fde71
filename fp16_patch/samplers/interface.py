"""Tells whether a release of a sampler has what is used of it, from `patches/<package>_interface.toml`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from packaging.version import Version

from fp16_patch.patching.declarations import declared_table
from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.releases.matrix import tested_levels

LEVELS = ("fingerprint", "worker", "end to end")


class Use(NamedTuple):
    """One thing that the sampler's side does with the package: why, and the names it needs in one of the modules."""

    why: str
    modules: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def from_toml(cls, declared: dict[str, Any]) -> Use:
        return cls(declared["why"], tuple(declared["modules"]), tuple(declared["names"]))

    def missing_in(self, sources: Sources) -> tuple[str, ...]:
        """Return the names that none of the modules has all of; empty if one has."""
        lacking = [self._not_in(sources.read(module) or "") for module in self.modules]
        return min(lacking, key=len)

    def _not_in(self, source: str) -> tuple[str, ...]:
        return tuple(name for name in self.names if not re.search(rf"(?<!\w){re.escape(name)}", source))


class Finding(NamedTuple):
    """What is to be said of the installed release, and whether no run can sample with it."""

    text: str
    fatal: bool


@dataclass(frozen=True)
class Interface:
    """What is used of one package.

    Attributes:
        package: its name, as pip and `import` know it.
    """

    package: str

    @cached_property
    def uses(self) -> tuple[Use, ...]:
        """What is declared."""
        declared = declared_table(f"{self.package}_interface.toml")
        return tuple(map(Use.from_toml, declared["uses"]))

    def lacking(self, sources: Sources) -> list[str]:
        """Return what a release does not have, one sentence each; empty if the sampler's side works there."""
        missing = ((use, use.missing_in(sources)) for use in self.uses)
        return [
            f"no {' and no '.join(names)} in {use.modules[0]}, by which {use.why}" for use, names in missing if names
        ]

    def finding(self, release: str | None, sources: Sources | None = None) -> Finding | None:
        """Judge the installed release for a command that samples with it; None if it lies among those that were run.

        Args:
            release: None if none is installed.
            sources: where its code is; what this Python would import if None.
        """
        package = self.package
        known, run = self._of_level(LEVELS), self._of_level(LEVELS[1:])
        fix = f"in a release from {known[0]} to {known[-1]} that the framework takes"
        if release is None:
            said = (
                f"{package} is not installed here, but the command samples with it. Fix: pip install {package}, {fix}"
            )
            return Finding(said, fatal=True)
        if missing := self.lacking(sources or Installed()):
            return Finding(f"{package}={release}: {missing[0]}. Fix: install {package} {fix}", fatal=True)
        first, last = run[0], run[-1]
        # Of a release, later builds and those for other hardware are the same.
        base = Version(Version(release).base_version)
        if Version(first) <= base <= Version(last):
            return None
        age = "older" if base < Version(first) else "newer"
        said = f"{package} {release} is {age} than what was run with fp16_patch ({first} to {last}). That is not fatal"
        why = "its code has all that is used of it, and each of its processes proves its dtype before training"
        return Finding(f"{said}: {why}", fatal=False)

    def _of_level(self, levels: Sequence[str]) -> list[str]:
        """Return the releases that are tested as far as one of these, oldest first."""
        of_it = {
            release.version: level for release, level in tested_levels().items() if release.package == self.package
        }
        return sorted((version for version, level in of_it.items() if level in levels), key=Version)
