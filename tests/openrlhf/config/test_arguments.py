"""What is read from and written to the command line is on it: a flag of another name would be silently passed over."""

from __future__ import annotations

import re
import runpy
import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.openrlhf
pytest.importorskip("openrlhf")

import fp16_patch
from fp16_patch import Plan

TRAINERS = ("train_ppo_ray", "train_sft", "train_dpo", "train_rm")


@pytest.fixture
def flags(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every flag that one of the installed release's trainers has."""
    monkeypatch.setattr(sys, "argv", ["trainer", "--help"])
    for trainer in TRAINERS:
        with pytest.raises(SystemExit):
            runpy.run_module(f"openrlhf.cli.{trainer}", run_name="__main__")
    return set(re.findall(r"--([a-z]\w*(?:\.\w+)*)", capsys.readouterr().out))


@pytest.fixture
def arguments() -> Any:
    """The module under test; importing its package activates."""
    from fp16_patch.openrlhf.config import arguments

    fp16_patch.deactivate()
    return arguments


def test_flags_that_are_read_and_written_are_the_installed_releases(
    flags: set[str], arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = "ds.zero_stage" in flags
    args = SimpleNamespace(**({"ds": SimpleNamespace()} if sections else {}))
    only_bf16 = "bf16" in flags
    if only_bf16:
        args.bf16 = False
    read: set[str] = set()
    get = arguments.get
    monkeypatch.setattr(arguments, "get", lambda args, key: read.add(arguments.spelled(args, key)))
    assert list(arguments.conflicts_of(args, Plan())) == []
    arguments.effective_dtypes(args, Plan())
    monkeypatch.setattr(arguments, "get", get)
    changes = arguments.apply_to(args, Plan())
    written = {change.partition(":")[0].removeprefix("--") for change in changes}
    # Flags of a release with sections, that one without does not have: an optimizer by name, a model of SFT.
    read -= {None} | ({"param_dtype"} if only_bf16 else set())
    assert len(read) > 10
    dtypes = {"bf16" if only_bf16 else "param_dtype", "grad_accum_dtype"}
    assert written == ({f"ds.{name}" for name in dtypes} if sections else dtypes)
    assert read | written <= flags
