"""Tells what a learner of the installed verl computes in where no plan decides, from `patches/stock_dtypes.toml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from packaging.specifiers import SpecifierSet

from fp16_patch.patching.declarations import declared_table, installed_release
from fp16_patch.plan.dtypes import BFLOAT16, torch_name
from fp16_patch.verl.config.selection import Select


@dataclass(frozen=True)
class Row:
    """What decides the dtype of some roles, in some releases.

    Attributes:
        engines: values of the role's `strategy`.
        releases: of verl.
        roles: empty for every role.
        unless: setting → value at which the row does not hold.
        reads: key of the dtype below the engine's settings; None if it is bfloat16 whatever is set.
        of: key of the engine settings that are read; None for the role's own.
        where: `module:qualname` of the function that decides; None if it cannot be imported here.
    """

    engines: tuple[str, ...]
    releases: SpecifierSet
    roles: tuple[str, ...] = ()
    unless: Mapping[str, str] = field(default_factory=dict)
    reads: str | None = None
    of: str | None = None
    where: str | None = None

    @classmethod
    def from_toml(cls, declared: dict[str, Any]) -> Row:
        lists = {key: tuple(declared.get(key, ())) for key in ("engines", "roles")}
        return cls(**{**declared, **lists, "releases": SpecifierSet(declared["releases"])})

    def holds(self, release: str | None) -> bool:
        """Return whether it is about this release; of one without a number, as a checkout may be, about the newest."""
        return release is None or self.releases.contains(release, prereleases=True)


def learner_dtype(select: Select, role: str, strategy: object, section: str, release: str | None = None) -> str:
    """Return the dtype, by torch's name, that a learner computes in without a plan.

    Args:
        select: the value of a key in the run's configuration; None where there is none.
        role: `actor`, `ref`, `critic` or `reward`.
        section: key of its engine's settings.
        release: of verl; the installed one if None.
    """
    release = release or installed_release("verl")
    row = next(_fitting(select, role, strategy, release), None)
    if row is None or row.reads is None:
        return BFLOAT16.torch
    return torch_name(select(f"{row.of or section}.{row.reads}") or BFLOAT16.torch)


def _fitting(select: Select, role: str, strategy: object, release: str | None) -> Iterator[Row]:
    for row in rows():
        excluded = any(select(key) == value for key, value in row.unless.items())
        if strategy in row.engines and role in (row.roles or (role,)) and row.holds(release) and not excluded:
            yield row


@lru_cache(maxsize=1)
def rows() -> tuple[Row, ...]:
    """Return the declared rows, in their order."""
    declared = declared_table("stock_dtypes.toml")
    return tuple(map(Row.from_toml, declared["verl"]))
