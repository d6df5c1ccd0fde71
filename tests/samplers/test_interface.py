"""What is said of a sampler that is missing, lacks what is used of it, or is older or newer than what was run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp16_patch.patching.sources import Installed, Tree
from fp16_patch.releases import matrix
from fp16_patch.samplers.interface import Interface, Use
from fp16_patch.sglang.sampler import SGLANG
from fp16_patch.vllm.sampler import VLLM
from tests.samplers.releases import make_release

INTERFACES = [sampler.interface for sampler in (VLLM, SGLANG)]
USED = [(each, name) for each in INTERFACES for name in sorted({name for use in each.uses for name in use.names})]
ALL = pytest.mark.parametrize("interface", INTERFACES, ids=lambda interface: interface.package)


def run_of(interface: Interface) -> list[str]:
    """The releases that were run, oldest first."""
    levels = matrix.tested_levels().items()
    return [each.version for each, level in levels if each.package == interface.package and level != "fingerprint"]


RUN = [(each, release) for each in INTERFACES for release in run_of(each)]
BUILDS = [(each, f"{run_of(each)[0]}{build}") for each in INTERFACES for build in (".post1", "+cpu")]


@pytest.mark.parametrize(
    "interface",
    [pytest.param(each, marks=getattr(pytest.mark, each.package), id=each.package) for each in INTERFACES],
)
def test_the_installed_release_has_all_that_is_used_of_it(interface: Interface) -> None:
    if Installed().read(interface.uses[0].modules[0]) is None:
        pytest.skip(f"{interface.package} is not installed here")
    assert interface.lacking(Installed()) == []


@pytest.mark.parametrize(("interface", "name"), USED)
def test_a_release_without_a_name_that_is_used_is_fatal_and_says_which(
    interface: Interface, name: str, tmp_path: Path
) -> None:
    package, release = interface.package, run_of(interface)[0]
    said = interface.finding(release, Tree(make_release(tmp_path, interface, release, without=name)))
    assert said is not None
    assert said.fatal
    assert said.text.startswith(f"{package}={release}: no {name} in {package}.")
    assert f"Fix: install {package} in a release from" in said.text


def test_a_name_in_one_of_several_modules_is_enough() -> None:
    use = Use("it works", ("vllm.new", "vllm.old"), ("f", "g"))

    class Vllm:
        def read(self, module: str) -> str | None:
            return {"vllm.old": "f = g = 1"}.get(module)

    assert use.missing_in(Vllm()) == ()
    # A name is no part of another.
    assert use._replace(modules=("vllm.old",), names=("=", "ff")).missing_in(Vllm()) == ("ff",)


@ALL
def test_a_missing_sampler_is_fatal(interface: Interface) -> None:
    package, said = interface.package, interface.finding(None)
    assert said is not None
    assert said.fatal
    assert said.text.startswith(
        f"{package} is not installed here, but the command samples with it. Fix: pip install {package}"
    )


@pytest.mark.parametrize(("interface", "release"), [*RUN, *BUILDS])
def test_of_a_release_among_those_that_were_run_nothing_is_said(
    interface: Interface, release: str, tmp_path: Path
) -> None:
    assert interface.finding(release, Tree(make_release(tmp_path, interface, release))) is None


@ALL
@pytest.mark.parametrize(("release", "age"), [("0.5.1", "older"), ("99.0", "newer")])
def test_an_older_or_newer_release_is_named_with_what_was_run_and_is_not_fatal(
    interface: Interface, release: str, age: str, tmp_path: Path
) -> None:
    run = run_of(interface)
    said = interface.finding(release, Tree(make_release(tmp_path, interface, release)))
    assert said is not None
    assert not said.fatal
    assert said.text.startswith(
        f"{interface.package} {release} is {age} than what was run with fp16_patch ({run[0]} to {run[-1]})"
    )
    assert "not fatal" in said.text
