from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fp16_patch import __version__
from fp16_patch.cli import main, run
from fp16_patch.mismatch.record.reading import record_folder
from fp16_patch.plan.plan import MODE_ENV, PLAN_ENV, Plan
from fp16_patch.plan.settings import SETTINGS
from fp16_patch.releases import tree_diff
from fp16_patch.runtime import propagation


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run` would have replaced this process with."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(shutil, "which", lambda program: None if program.startswith("no-") else program)
    monkeypatch.setattr(run, "import_problem", lambda python, startup: None)

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
        (["run", "--", "srun", "-N1", "docker", "run", "image", "python"], "docker run … fp16-patch run -- python …"),
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


@pytest.mark.parametrize(
    "command", ["doctor", "run", "settings", "watch", "report", "analyze", "probe", "matrix", "diff", "demo"]
)
def test_help_has_examples(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"], env={"COLUMNS": "80"}).output
    assert "Example" in shown
    assert max(map(len, shown.splitlines())) <= 80
    # The list of commands shows the first sentence whole.
    (line,) = [
        line for line in CliRunner().invoke(main, ["--help"]).output.splitlines() if line.split()[:1] == [command]
    ]
    assert not line.endswith("...")
    assert line.removeprefix(f"  {command}").strip() in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--modes", "bf16", "--", "echo"], "No such option '--modes'. Did you mean '--mode'"),
        (["doctor", "--jsn"], "No such option '--jsn'. Did you mean '--json'"),
        (["report", ".", "--html", "no/such/page.html"], "there is no folder no/such. Fix: mkdir -p no/such"),
        (["analyze", "x.jsonl", "--html", "no/such/page.html"], "there is no folder no/such. Fix: mkdir -p no/such"),
        (["probe", ".", "--json", "no/such/probe.json"], "there is no folder no/such. Fix: mkdir -p no/such"),
        (["diff", "--source", ".", "--output", "no/such.diff"], "there is no folder no. Fix: mkdir -p no"),
        (["diff", "--source", ".", "--mode", "observe"], "'observe' is none of fp16, bf16, fp32"),
    ],
)
def test_a_slip_is_named_before_any_work(arguments: list[str], said: str) -> None:
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 2
    assert said in " ".join(shown.output.split()).replace("No such option: ", "No such option ")


def test_a_program_that_is_not_executable_is_not_called_missing(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text("echo training\n")
    shown = CliRunner().invoke(main, ["run", "--", str(script)])
    assert shown.exit_code == 1
    assert f"{script}: not executable. Fix: chmod +x {script}" in shown.output


def test_a_python_that_cannot_import_us_is_not_started(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named wrapt' >&2\nexit 1\n")
    python.chmod(0o755)
    shown = CliRunner().invoke(main, ["run", "--", str(python), "-m", "verl.trainer.main_ppo"])
    assert shown.exit_code == 1
    assert f"{python} cannot import fp16_patch (ModuleNotFoundError: No module named wrapt)" in shown.output


@pytest.mark.parametrize(
    ("front", "said"),
    [
        (
            ["{python}", "-S"],
            "-S cannot import fp16_patch (ModuleNotFoundError: No module named 'wrapt'). Fix: install",
        ),
        (["{launcher}", "--standalone"], "-S cannot import fp16_patch (ModuleNotFoundError: No module named 'wrapt')"),
        (
            ["nohup", "{python}", "-uI"],
            "-I does not start fp16_patch (it does not run our sitecustomize, which PYTHONPA",
        ),
        (
            ["env", "-i", "{python}"],
            "does not start fp16_patch (it does not run our sitecustomize, which PYTHONPATH na",
        ),
        (["env", "PYTHONPATH=/nowhere", "{python}"], "Fix: leave out options of Python such as -I, `env -i`"),
    ],
)
def test_the_commands_own_python_is_asked(front: list[str], said: str, tmp_path: Path) -> None:
    launcher = tmp_path / "launch"
    launcher.write_text(f"#!{sys.executable} -S\n")
    launcher.chmod(0o755)
    words = [word.format(python=sys.executable, launcher=launcher) for word in front]
    shown = CliRunner().invoke(main, ["run", "--", *words, "train.py"])
    assert shown.exit_code == 1
    assert said in shown.output


def test_the_python_that_types_the_command_can_start_us(tmp_path: Path) -> None:
    startup = Path(propagation.__file__).parent / "startup"
    assert run.import_problem((sys.executable,), startup) is None


def test_a_mode_that_is_typed_goes_over_a_carried_plan(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLAN_ENV, Plan(init_scale=8.0).to_json())
    monkeypatch.setenv(MODE_ENV, "fp16")
    CliRunner().invoke(main, ["run", "--mode", "bf16", "--", "python"])
    assert Plan.from_environment(started["env"]) == Plan(mode="bf16", init_scale=8.0)
    started.clear()
    propagation.stop_carrying()
    monkeypatch.setenv(PLAN_ENV, Plan().to_json())
    monkeypatch.setenv(MODE_ENV, "bf16")
    shown = CliRunner().invoke(main, ["run", "--", "python"])
    assert not started
    assert "FP16_PATCH=bf16: the plan that was carried to this process says fp16" in shown.output


def test_run_says_what_it_does(started: dict[str, Any]) -> None:
    shown = CliRunner().invoke(main, ["run", "--mode", "bfloat16", "--", "python", "-m", "job"])
    assert shown.stdout == ""
    assert shown.stderr.startswith(f"fp16_patch {__version__}: bf16 in every role")
    assert shown.stderr.endswith("Starting python -m job\n")


def test_a_variable_that_looks_like_ours_is_warned_of(started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP16PATCH", "bf16")
    shown = CliRunner().invoke(main, ["run", "--", "python"])
    assert "warning: FP16PATCH is not read. Did you mean FP16_PATCH?" in shown.stderr


def settings(*arguments: str, **env: str) -> Any:
    return CliRunner().invoke(main, ["settings", *arguments], env={"COLUMNS": "80", **env})


def test_settings_says_what_is_in_force_and_where_it_came_from() -> None:
    shown = settings(FP16_PATCH_INIT_SCALE="1024")
    rows = {row[0]: row[1:] for line in shown.stdout.splitlines() if len(row := line.split()) == 4}
    assert shown.exit_code == 0
    assert rows["init_scale"] == ["1024", "65536", "FP16_PATCH_INIT_SCALE"]
    assert rows["first_scale"] == ["fixed", "measured", "FP16_PATCH_INIT_SCALE"]
    assert rows["max_retries"] == ["8", "8", "default"]
    assert rows.keys() >= SETTINGS.keys()
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_settings_are_json_or_explained() -> None:
    found = json.loads(settings("--json", "--mode", "bf16", FP16_PATCH_ALERT_K1="0.2").stdout)
    assert list(found) == list(SETTINGS)
    assert (found["mode"]["value"], found["mode"]["from"]) == ("bf16", "--mode")
    assert (found["alert_k1"]["value"], found["alert_k1"]["default"]) == (0.2, 0.1)
    meant = " ".join(settings("--verbose").stdout.split())
    assert all(setting.help.replace("`", "") in meant for setting in SETTINGS.values())


def test_a_wrong_setting_is_one_line() -> None:
    shown = settings(FP16_PATCH_INIT_SCAL="2")
    assert shown.exit_code == 1
    assert shown.stderr.startswith("Error: FP16_PATCH_INIT_SCAL=2: fp16_patch has no such setting.")


def test_diff_takes_the_environments_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(tree_diff, "diff_of", lambda source, plan: seen.append(plan.mode) or ("", []))
    for arguments, env in (([], {}), ([], {MODE_ENV: "bf16"}), (["--dtype", "float32"], {MODE_ENV: "bf16"})):
        CliRunner().invoke(main, ["diff", "--source", str(tmp_path), *arguments], env=env)
    assert seen == ["fp16", "bf16", "fp32"]
    refused = CliRunner().invoke(main, ["diff", "--source", str(tmp_path)], env={MODE_ENV: "observe"})
    assert refused.exit_code == 2
    assert "FP16_PATCH=observe decides no dtype" in refused.output


def test_a_run_one_level_down_is_found(tmp_path: Path) -> None:
    record = tmp_path / "checkpoints" / "fp16_patch"
    record.mkdir(parents=True)
    nothing = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert nothing.exit_code == 1
    assert "no run record: looked for plan.json" in nothing.output
    assert CliRunner().invoke(main, ["watch", str(tmp_path), "--once"]).output == nothing.output

    line = {"step": 1, "metrics": {"fp16/loss_scale": 2.0}}
    (record / "steps.jsonl").write_text(json.dumps(line) + "\n")
    watched = CliRunner().invoke(main, ["watch", str(tmp_path), "--once"])
    assert (watched.exit_code, "loss scale" in watched.output) == (0, True)
    assert record_folder(tmp_path) == record
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds several runs"):
        record_folder(tmp_path)
