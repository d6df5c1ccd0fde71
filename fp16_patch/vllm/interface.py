"""Tells whether a release of vLLM has what the sampler's side uses of it, from `patches/vllm_interface.toml`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from packaging.version import Version

from fp16_patch.patching.declarations import declared_table
from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.releases.matrix import tested_levels

PACKAGE = "vllm"
LEVELS = ("fingerprint", "worker", "end to end")


class Use(NamedTuple):
    """One thing that the sampler's side does with vLLM: why, and the names it needs in one of the modules."""

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
    """What is to be said of the installed vLLM, and whether no run can sample with it."""

    text: str
    fatal: bool


@lru_cache(maxsize=1)
def uses() -> tuple[Use, ...]:
    """Return what is declared."""
    declared = declared_table("vllm_interface.toml")
    return tuple(map(Use.from_toml, declared["uses"]))


def lacking(sources: Sources) -> list[str]:
    """Return what a release of vLLM does not have, one sentence each; empty if the sampler's side works there."""
    missing = ((use, use.missing_in(sources)) for use in uses())
    return [f"no {' and no '.join(names)} in {use.modules[0]}, by which {use.why}" for use, names in missing if names]


def finding(release: str | None, sources: Sources | None = None) -> Finding | None:
    """Judge the installed vLLM for a command that samples with it; None if it lies among those that were run.

    Args:
        release: None if none is installed.
        sources: where its code is; what this Python would import if None.
    """
    oldest, *_, newest = _of_level(LEVELS)
    fix = f"in a release from {oldest} to {newest} that the framework takes"
    if release is None:
        said = f"{PACKAGE} is not installed here, but the command samples with it. Fix: pip install {PACKAGE}, {fix}"
        return Finding(said, fatal=True)
    if missing := lacking(sources or Installed()):
        return Finding(f"{PACKAGE}={release}: {missing[0]}. Fix: install {PACKAGE} {fix}", fatal=True)
    first, *_, last = _of_level(LEVELS[1:])
    if Version(first) <= Version(release) <= Version(last):
        return None
    age = "older" if Version(release) < Version(first) else "newer"
    said = f"{PACKAGE} {release} is {age} than what was run with fp16_patch ({first} to {last}). That is not fatal"
    why = "its code has all that is used of it, and each of its processes proves its dtype before training"
    return Finding(f"{said}: {why}", fatal=False)


def _of_level(levels: Sequence[str]) -> list[str]:
    """Return the releases of vLLM that are tested as far as one of these, oldest first."""
    of_vllm = {release.version: level for release, level in tested_levels().items() if release.package == PACKAGE}
    return sorted((version for version, level in of_vllm.items() if level in levels), key=Version)
