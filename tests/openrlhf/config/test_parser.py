"""OpenRLHF's own parser, found in its source: the same flags, values and refusals as when it is run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.openrlhf
pytest.importorskip("openrlhf")

import fp16_patch
from fp16_patch import PlanError
from tests.openrlhf.config.test_arguments import TRAINERS

PPO = "openrlhf.cli.train_ppo_ray"


@pytest.fixture(autouse=True)
def parser() -> Any:
    """The module under test; importing its package activates."""
    from fp16_patch.openrlhf.config import parser

    fp16_patch.deactivate()
    return parser


@pytest.mark.parametrize("trainer", TRAINERS)
def test_it_has_the_flags_that_the_trainer_shows(trainer: str, parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    argv, sys.argv = sys.argv, [trainer, "--help"]
    try:
        with pytest.raises(SystemExit):
            runpy.run_module(f"openrlhf.cli.{trainer}", run_name="__main__")
    finally:
        sys.argv = argv
    found = parser.parser_of(f"openrlhf.cli.{trainer}")
    found.prog = trainer
    assert found.format_help() == capsys.readouterr().out


def test_values_have_openrlhfs_types_and_defaults(parser: Any) -> None:
    from fp16_patch.openrlhf.config.arguments import get, spelled

    empty = parser.parsed(PPO, [])
    assert get(empty, "ds.zero_stage") == 2
    assert get(empty, "ds.load_in_4bit") is False
    args = parser.parsed(PPO, [f"--{spelled(empty, 'ds.zero_stage')}", "3", f"--{spelled(empty, 'rollout.top_p')}=0.5"])
    assert (get(args, "ds.zero_stage"), get(args, "rollout.top_p")) == (3, 0.5)


def test_an_unknown_flag_is_refused(parser: Any) -> None:
    with pytest.raises(PlanError, match="unrecognized arguments: --no_such_flag"):
        parser.parsed(PPO, ["--no_such_flag"])


def test_a_flag_without_its_value_is_refused(parser: Any) -> None:
    from fp16_patch.openrlhf.config.arguments import flag

    with pytest.raises(PlanError, match="expected one argument"):
        parser.parsed(PPO, [flag(parser.parsed(PPO, []), "ds.zero_stage")])


def test_a_module_that_is_not_there_is_named(parser: Any) -> None:
    with pytest.raises(PlanError, match=r"openrlhf\.cli\.train_nothing: no such module is installed"):
        parser.parsed("openrlhf.cli.train_nothing", [])


def test_another_layout_is_named(parser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser.Installed, "read", lambda installed, module: "import click")
    with pytest.raises(PlanError, match="its parser is not where OpenRLHF's are"):
        parser.parsed(PPO, [])


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    program = f"""
import sys
from fp16_patch.openrlhf.config.parser import parsed
parsed({PPO!r}, [])
print([name for name in ("torch", "ray", "vllm", "openrlhf") if name in sys.modules])
"""
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={"FP16_PATCH": "off", "PYTHONPATH": str(Path(fp16_patch.__file__).parents[1]), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert said.stdout.strip() == "[]"
