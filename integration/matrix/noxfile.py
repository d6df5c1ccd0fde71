"""One session for each release and level: `nox -f integration/matrix/noxfile.py --list`.

Sessions run in the environments that `make` has made; a release that an environment does not hold is put before it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import nox

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from fp16_patch.patching.declarations import declared_patches
from integration.matrix.overlay import overlay
from integration.matrix.versions import Environment, Tested, Together, others, tested_releases, tested_together

nox.options.default_venv_backend = "none"
nox.options.error_on_missing_interpreters = True
RELEASES = tested_releases()
_OTHERS = [release for release in others(RELEASES) if release.reaches("worker")]
OLDEST = list({release.package: release for release in reversed(_OTHERS)}.values())


def releases_at(level: str) -> list[object]:
    """As parameters of a session, with tags that name some of those that `make test` does not run."""
    return [
        nox.param(release, id=f"{release.package}-{release.version}", tags=tags(release, level))
        for release in RELEASES
        if release.reaches(level)
    ]


def tags(release: Tested, level: str) -> list[str]:
    """Of the learners, `oldest`: of its framework; `verl-others`, `openrlhf-others`: all of them."""
    if level != "worker" or release not in _OTHERS:
        return []
    return [f"{release.package}-others", *(["oldest"] if release in OLDEST else [])]


@nox.session(tags=["fingerprints"])
def fingerprints(session: nox.Session) -> None:
    """Every release's wheel against the declarations of the patches."""
    session.chdir(ROOT)
    patched = {patch.package for patch in declared_patches()}
    releases = [release for release in RELEASES if release.package in patched]
    checks = [argument for release in releases for argument in ("--check", str(release))]
    session.run(sys.executable, "-m", "fp16_patch.cli", "matrix", *checks, external=True)


@nox.session
def samplers(session: nox.Session) -> None:
    """Every release of a sampler against what is used of it; downloads a gigabyte."""
    session.chdir(ROOT)
    session.run(sys.executable, "-m", "integration.matrix.samplers", external=True)


@nox.session(name="own-tests")
def own_tests(session: nox.Session) -> None:
    """verl's own unit tests without us, observed and in FP16."""
    session.chdir(ROOT)
    session.run(sys.executable, "-m", "integration.matrix.own_tests", *session.posargs, external=True)


@nox.session
@nox.parametrize("release", releases_at("worker"))
def worker(session: nox.Session, release: Tested) -> None:
    """The learner of a release."""
    _test(session, release, "worker")


@nox.session(name="end-to-end")
@nox.parametrize("release", releases_at("end to end"))
def end_to_end(session: nox.Session, release: Tested) -> None:
    """The command line of a release, started as a user starts it: every process imports all it needs."""
    _test(session, release, "end to end", RUNS_START_COLD="1")


@nox.session
@nox.parametrize("pair", [nox.param(pair, id=str(pair)) for pair in tested_together()])
def together(session: nox.Session, pair: Together) -> None:
    """A release in an environment besides its own, or with other companions."""
    _test_in(session, pair.release, pair.release.environment, pair.tests)


def _test(session: nox.Session, release: Tested, level: str, **env: str) -> None:
    _test_in(session, release, *release.tests(level), **env)


def _test_in(session: nox.Session, release: Tested, environment: Environment, tests: Sequence[str], **env: str) -> None:
    session.chdir(ROOT)
    env["EVERY_ARM"] = "1"
    if release.companions or not environment.holds(release.requirement):
        env["PYTHONPATH"] = str(overlay(release))
    session.run(str(environment.python), "-m", "pytest", *tests, *session.posargs, env=env, external=True)
