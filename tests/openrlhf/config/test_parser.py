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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--no_such_flag",), "command=--no_such_flag: argparse rejects it: unrecognized arguments: --no_such_flag"),
        (("--no_such_flag=3", "and", "more"), "command=--no_such_flag: argparse rejects it: unrecognized arguments"),
        (("4bit=False", "stray"), "command=4bit=False: argparse rejects it: unrecognized arguments: 4bit=False stray"),
    ],
)
def test_an_unknown_flag_is_named_alone(flags: tuple[str, ...], said: str, parser: Any) -> None:
    with pytest.raises(PlanError) as refusal:
        parser.parsed(PPO, flags)
    assert str(refusal.value).startswith(said)
    assert "train_ppo_ray" not in str(refusal.value)


def test_a_flag_without_its_value_is_refused(parser: Any) -> None:
    from fp16_patch.openrlhf.config.arguments import flag

    stage = flag(parser.parsed(PPO, []), "ds.zero_stage")
    with pytest.raises(PlanError, match=f"^command={stage}: argparse rejects it: .*expected one argument"):
        parser.parsed(PPO, [stage])


def test_a_switch_with_a_value_is_said_to_be_a_switch(parser: Any) -> None:
    from fp16_patch.openrlhf.config.arguments import flag

    switch = flag(parser.parsed(PPO, []), "ds.load_in_4bit")
    with pytest.raises(PlanError) as refusal:
        parser.parsed(PPO, [f"{switch}=False"])
    assert str(refusal.value) == (
        f"{switch}=False: argparse rejects it: {switch} is a switch, which takes no value. "
        "Fix: leave it out, or give it alone to switch it on"
    )


def test_a_flag_of_a_release_with_other_sections_is_told_its_name_here(parser: Any) -> None:
    from fp16_patch.openrlhf.config.arguments import flag

    stage = flag(parser.parsed(PPO, []), "ds.zero_stage")
    other = "--zero_stage" if "." in stage else "--ds.zero_stage"
    with pytest.raises(PlanError, match=f"^command={other}: .*did you mean {stage}"):
        parser.parsed(PPO, [other, "3"])


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


@pytest.mark.parametrize(
    ("trainer", "roles"), [("train_sft", ["model"]), ("train_dpo", ["model", "ref"]), ("train_rm", ["model"])]
)
def test_training_on_a_data_set_is_judged_as_what_it_is(trainer: str, roles: list[str], parser: Any) -> None:
    from fp16_patch import Plan
    from fp16_patch.openrlhf.config import arguments, caveats

    empty = parser.parsed(f"openrlhf.cli.{trainer}", [])
    lora, stage = arguments.flag(empty, "ds.lora.rank"), arguments.flag(empty, "ds.zero_stage")
    args = parser.parsed(f"openrlhf.cli.{trainer}", [lora, "8", stage, "3"])
    assert arguments.is_supervised(args)
    assert arguments.effective_dtypes(args, Plan()) == dict.fromkeys(roles, "float16")
    assert list(arguments.conflicts_of(args, Plan())) == []
    assert caveats.caveats_of(args) == []
    sampling = parser.parsed(PPO, [lora, "8", stage, "3"])
    assert not arguments.is_supervised(sampling)
    (conflict,) = arguments.conflicts_of(sampling, Plan())
    assert conflict.key == lora


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_a_command_line_that_only_prints_is_no_training(
    flag: str, parser: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PlanError, match="--help: it prints, and trains nothing"):
        parser.parsed(PPO, [flag])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("main", "said"),
    [
        ("def main(:", "invalid syntax"),
        ("x = 1", "StopIteration"),
        ("if __name__ == '__main__':\n    1 / 0\n    parser.parse_args()", "ZeroDivisionError"),
        ("if __name__ == '__main__':\n    parser = 5\n    parser.parse_args()", "parser is a int"),
    ],
)
def test_a_main_of_another_making_is_a_sentence(
    main: str, said: str, parser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_fork").mkdir()
    (tmp_path / "a_fork" / "__init__.py").touch()
    (tmp_path / "a_fork" / "train.py").write_text(main + "\n")
    with pytest.raises(PlanError, match=said):
        parser.parsed("a_fork.train", ["--flag"])


def test_a_flag_whose_reader_fails_is_named(parser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "another_fork").mkdir()
    (tmp_path / "another_fork" / "__init__.py").touch()
    (tmp_path / "another_fork" / "train.py").write_text(
        "import argparse\nif __name__ == '__main__':\n    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--gpus', type=lambda text: {}[text])\n    args = parser.parse_args()\n"
    )
    with pytest.raises(PlanError, match="argparse rejects it: KeyError: 'four'"):
        parser.parsed("another_fork.train", ["--gpus", "four"])
