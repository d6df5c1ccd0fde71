"""What `versions.toml` says."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
VERSIONS = Path(__file__).with_name("versions.toml")
LEVELS = ("fingerprint", "worker", "end to end")
"""Each includes those before it; the first needs nothing installed, so no environment has tests of it."""


@dataclass(frozen=True)
class Environment:
    """Packages that fit together, at the releases a lock file names.

    Attributes:
        folder: of the virtual environment, in the checkout.
        tests: level → what pytest is given.
        in_make_test: `make test` runs its tests on what it holds.
    """

    name: str
    folder: str
    lock: str
    tests: Mapping[str, tuple[str, ...]]
    in_make_test: bool = False

    @property
    def python(self) -> Path:
        return ROOT / self.folder / "bin" / "python"

    def holds(self, requirement: str) -> bool:
        """Whether the lock file names this release."""
        return requirement in (ROOT / self.lock).read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class Tested:
    """A release, and how far it is tested where.

    Attributes:
        companions: requirements that replace what the environment holds, where the release needs others.
        elsewhere: level → environment and tests, where these are not those of `environment`.
        distribution: the name it is installed by, where that is not the package's.
    """

    package: str
    version: str
    environment: Environment
    level: str
    companions: tuple[str, ...] = ()
    elsewhere: Mapping[str, tuple[Environment, tuple[str, ...]]] = field(default_factory=dict)
    distribution: str | None = None

    @property
    def requirement(self) -> str:
        """By which pip finds it."""
        return f"{self.distribution or self.package}=={self.version}"

    @property
    def locked(self) -> bool:
        """Whether it is the release that its environment holds."""
        return self.environment.holds(self.requirement)

    def tests(self, level: str) -> tuple[Environment, tuple[str, ...]]:
        """Where a level is tested, and by what."""
        return self.elsewhere.get(level) or (self.environment, self.environment.tests[level])

    def reaches(self, level: str) -> bool:
        return LEVELS.index(level) <= LEVELS.index(self.level)

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Together:
    """A release in an environment besides its own, or with other companions, and the tests that are for both."""

    release: Tested
    tests: tuple[str, ...]

    def __str__(self) -> str:
        others = [requirement.replace("==", "-") for requirement in self.release.companions]
        return "-".join([self.release.package, self.release.version, self.release.environment.name, *others[:1]])


def tested_together(path: Path = VERSIONS) -> list[Together]:
    """What is tested besides each release in its own environment, in the order of the file."""
    declared, known = _declared(path), {str(release): release for release in tested_releases(path)}
    environments = _environments(declared)
    return [
        Together(
            replace(
                known[row["release"]],
                environment=environments[row["environment"]],
                companions=tuple(row.get("with", ())),
            ),
            tuple(row["tests"]),
        )
        for row in declared["together"]
    ]


def tested_releases(path: Path = VERSIONS) -> list[Tested]:
    """The releases of all frameworks, in the order of the file."""
    declared = _declared(path)
    environments = _environments(declared)
    return [
        Tested(
            package,
            version,
            environments[cell["environment"]],
            cell["level"],
            tuple(cell.get("with", ())),
            {
                level: (environments[cell[level]["environment"]], tuple(cell[level]["tests"]))
                for level in LEVELS
                if level in cell
            },
            cell.get("distribution"),
        )
        for package, releases in declared["releases"].items()
        for version, cell in releases.items()
    ]


def others(releases: Sequence[Tested]) -> list[Tested]:
    """Those that `make test` does not run."""
    return [release for release in releases if not (release.locked and release.environment.in_make_test)]


def _declared(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _environments(declared: Mapping[str, Any]) -> dict[str, Environment]:
    return {name: _environment(name, table) for name, table in declared["environments"].items()}


def _environment(name: str, table: Mapping[str, object]) -> Environment:
    tests = {level: tuple(table[level]) for level in LEVELS[1:]}  # type: ignore[arg-type]
    return Environment(name, str(table["folder"]), str(table["lock"]), tests, bool(table.get("in_make_test")))
