from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
from click.testing import CliRunner

from fp16_patch.cli import main
from fp16_patch.plan.plan import MODE_ENV, PLAN_ENV, Plan


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run` would have replaced this process with."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(shutil, "which", lambda program: None if program.startswith("no-") else program)

    def execvp(file: str, arguments: list[str]) -> None:
        found.update(arguments=arguments, env=dict(os.environ))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvp", execvp)
    for name in (MODE_ENV, PLAN_ENV, "VERL_USE_EXTERNAL_MODULES", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return found


def test_run_starts_the_command_as_it_is_with_the_plan_in_its_environment(started: dict[str, Any]) -> None:
    shown = CliRunner().invoke(main, ["run", "--", "python", "-m", "job", "--flag", "a.b=c"])
    assert shown.exit_code == 0, shown.output
    assert started["arguments"] == ["python", "-m", "job", "--flag", "a.b=c"]
    assert Plan.from_environment(started["env"]) == Plan()
    # Unlike a plugin's, this import's failure is not swallowed.
    assert started["env"]["VERL_USE_EXTERNAL_MODULES"] == "fp16_patch.autoload"


def test_run_keeps_the_modules_the_user_loads(started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "theirs")
    CliRunner().invoke(main, ["run", "--mode", "observe", "--", "python"])
    assert started["env"]["VERL_USE_EXTERNAL_MODULES"] == "theirs,fp16_patch.autoload"
    assert Plan.from_environment(started["env"]).mode == "observe"


def test_mode_off_wins_over_the_environment(started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_ENV, "1")
    CliRunner().invoke(main, ["run", "--mode", "off", "--", "python"])
    assert not Plan.from_environment(started["env"]).active
    assert "VERL_USE_EXTERNAL_MODULES" not in started["env"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--", "no-such-program"], "no-such-program: no such program"),
        (["run", "--", "ray", "job", "submit"], "ray job submit … -- fp16-patch run -- python …"),
        (["run", "--mode", "fp8", "--", "python"], "mode=fp8: no such mode"),
        (["report", "no/such/run"], "no/such/run"),
        (["analyze", "no/such/file"], "no/such/file: no such file or directory"),
        (["watch", "no/such/run"], "no/such/run: no such directory"),
    ],
)
def test_what_cannot_be_done_is_said(started: dict[str, Any], arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code != 0
    assert message in shown.output
    assert not started


@pytest.mark.parametrize("command", ["doctor", "run", "report", "analyze", "watch"])
def test_help_has_examples(command: str) -> None:
    assert "Examples:" in CliRunner().invoke(main, [command, "--help"]).output
