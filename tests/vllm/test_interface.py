"""What is said of a vLLM that is missing, lacks what is used of it, or is older or newer than what was run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp16_patch.patching.sources import Installed, Tree
from fp16_patch.releases import matrix
from fp16_patch.vllm import interface
from tests.vllm.releases import make_release

NAMES = sorted({name for use in interface.uses() for name in use.names})
RUN = [each.version for each, level in matrix.tested_levels().items() if (each.package, level) == ("vllm", "worker")]


@pytest.mark.vllm
def test_the_installed_vllm_has_all_that_is_used_of_it() -> None:
    pytest.importorskip("vllm")
    assert interface.lacking(Installed()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_release_without_a_name_that_is_used_is_fatal_and_says_which(name: str, tmp_path: Path) -> None:
    said = interface.finding(RUN[0], Tree(make_release(tmp_path, RUN[0], without=name)))
    assert said is not None
    assert said.fatal
    assert said.text.startswith(f"vllm={RUN[0]}: no {name} in vllm.")
    assert "Fix: install vllm in a release from" in said.text


def test_a_name_in_one_of_several_modules_is_enough() -> None:
    use = interface.Use("it works", ("vllm.new", "vllm.old"), ("f", "g"))

    class Vllm:
        def read(self, module: str) -> str | None:
            return {"vllm.old": "f = g = 1"}.get(module)

    assert use.missing_in(Vllm()) == ()
    # A name is no part of another.
    assert use._replace(modules=("vllm.old",), names=("=", "ff")).missing_in(Vllm()) == ("ff",)


def test_a_missing_vllm_is_fatal() -> None:
    said = interface.finding(None)
    assert said is not None
    assert said.fatal
    assert said.text.startswith("vllm is not installed here, but the command samples with it. Fix: pip install vllm")


@pytest.mark.parametrize("release", [*RUN, f"{RUN[0]}.post1", f"{RUN[0]}+cpu"])
def test_of_a_release_among_those_that_were_run_nothing_is_said(release: str, tmp_path: Path) -> None:
    assert interface.finding(release, Tree(make_release(tmp_path, release))) is None


@pytest.mark.parametrize(("release", "age"), [("0.12.0", "older"), ("99.0", "newer")])
def test_an_older_or_newer_release_is_named_with_what_was_run_and_is_not_fatal(
    release: str, age: str, tmp_path: Path
) -> None:
    said = interface.finding(release, Tree(make_release(tmp_path, release)))
    assert said is not None
    assert not said.fatal
    assert said.text.startswith(f"vllm {release} is {age} than what was run with fp16_patch ({RUN[0]} to {RUN[-1]})")
    assert "not fatal" in said.text
