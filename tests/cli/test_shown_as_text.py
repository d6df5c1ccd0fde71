"""Names and texts of others reach the terminal as text, in every command."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fp16_patch.cli import main
from fp16_patch.cli.examination import print_examination
from fp16_patch.doctor import Examination
from fp16_patch.patching.declarations import declared_patches
from fp16_patch.plan.errors import Conflict
from fp16_patch.releases import matrix

ODD = "run[lr=1e-6] [b]x[/b] [/] \x1b]0;title\x07\x1b[2J\u202e"
SHOWN = r"run[lr=1e-6] [b]x[/b] [/] \x1b]0;title\x07\x1b[2J\u202e"


def shown(*arguments: str, **env: str) -> Any:
    return CliRunner().invoke(main, arguments, env={"COLUMNS": "300", **env}, color=True)


def assert_text(output: str) -> None:
    found = {character for character in output if unicodedata.category(character) in ("Cc", "Cf", "Cs")}
    assert found <= {"\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / ODD.replace("/", "|")
    made.mkdir()
    return made


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", ODD),
        ("report", ".", f"--{ODD}"),
        (ODD,),
        (f"--{ODD}",),
        ("analyze", ODD),
        ("analyze", ".", "--html", f"no/{ODD}/x"),
        ("watch", ODD, "--once"),
        ("watch", "--every", ODD),
        ("probe", ODD),
        ("probe", ".", "--mode", ODD),
        ("probe", ".", "--count", ODD),
        ("probe", ".", "--sampler", ODD),
        ("matrix", "--check", ODD),
        ("matrix", ODD),
        ("doctor", "--source", ODD),
        ("diff", "--source", ".", "--mode", ODD),
        ("settings", "--mode", ODD),
        ("settings", "--", ODD),
        ("run", "--mode", ODD, "--", "true"),
        ("run", "--", ODD),
    ],
    ids=" ".join,
)
def test_an_error_quotes_what_was_typed_as_text(arguments: tuple[str, ...]) -> None:
    ended = shown(*arguments)
    assert isinstance(ended.exception, SystemExit)
    assert ended.exit_code in (1, 2)
    assert_text(ended.output)
    if not arguments[-1].startswith("--"):
        assert r"[/] \x1b]0;title\x07" in ended.output


def test_a_source_tree_keeps_its_name(folder: Path) -> None:
    patch = next(patch for patch in declared_patches() if patch.framework == "openrlhf")
    target = folder / f"{patch.variants[0].target.partition(':')[0].replace('.', '/')}.py"
    target.parent.mkdir(parents=True)
    target.write_text("def other(): ...\n")
    verdicts = matrix.check(matrix.Tree(folder), [patch], None)
    assert verdicts
    ended = shown("doctor", "--source", str(folder))
    assert SHOWN.replace("/", "|") in ended.output
    assert_text(ended.output)


def test_what_the_doctor_found_is_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    found = Examination(
        ODD,
        [str(Conflict("key", ODD, "a reason", "a fix")), f"first\n{ODD}"],
        {"verl": ODD},
        [{"name": ODD, "facts": ODD}],
        {"patch": ODD},
        {ODD: ODD},
        {ODD: ODD},
        [ODD],
        [ODD],
    )
    print_examination(found, verbose=True)
    output = capsys.readouterr().out
    assert output.count(SHOWN) == 11
    assert_text(output)


def test_a_setting_is_shown_as_text() -> None:
    model = f"/models/{ODD}\n"
    for arguments in ((), ("--verbose",)):
        ended = shown("settings", *arguments, FP16_PATCH="bf16", FP16_PATCH_PROBE=model)
        assert ended.exit_code == 0, ended.output
        assert f"/models/{SHOWN}\\n" in ended.output
        assert_text(ended.output)
    found = json.loads(shown("settings", "--json", FP16_PATCH="bf16", FP16_PATCH_PROBE=model).stdout)
    assert found["probe"]["value"] == model


def test_runs_keep_their_brackets(tmp_path: Path) -> None:
    line = json.dumps({"sampler_log_probs": [-0.1, -0.2], "learner_log_probs": [-0.1, -0.3]})
    names = ("grpo[a]", "grpo[b]", "run[lr=1e-6]", "[/b]")
    for name in names:
        (tmp_path / name.replace("/", "|")).mkdir()
        (tmp_path / name.replace("/", "|") / "d.jsonl").write_text(line + "\n")
    ended = shown("analyze", *(str(tmp_path / name.replace("/", "|")) for name in names))
    assert ended.exit_code == 0, ended.output
    assert all(name.replace("/", "|") in ended.output.splitlines()[2] for name in names), ended.output
