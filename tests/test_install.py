"""What `pip install` of us does to an environment that has everything already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fp16_patch import __version__
from fp16_patch.cli import main

ROOT = Path(__file__).parents[1]
pytest.importorskip("hatchling")


def pip(*arguments: str, python: Path | None = None) -> str:
    elsewhere = [] if python is None else ["--python", str(python)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *elsewhere, *arguments, "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make dist` does."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.timeout(300)
@pytest.mark.parametrize("extra", ["", "[report]"])
def test_installing_us_changes_nothing_else(extra: str) -> None:
    # Resolves every dependency of ours against what is installed, and reports what would be installed.
    report = json.loads(
        pip("install", "--dry-run", "--no-index", "--no-build-isolation", "--report", "-", f"{ROOT}{extra}")
    )
    assert [item["metadata"]["name"] for item in report["install"]] == ["fp16-patch"]


def test_the_wheel_carries_patches_types_and_entry_points(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    declared = {path.relative_to(ROOT).as_posix() for path in (ROOT / "patches").rglob("*.toml")}
    assert {f"fp16_patch/{name}" for name in declared} <= set(names)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fp16_patch").rglob("*.py")}
    assert {*modules, "fp16_patch/py.typed", "fp16_patch/versions.toml"} <= set(names)
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fp16_patch").rglob("*.html.j2")}
    pages |= {f"fp16_patch/mismatch/report/templates/page.{kind}" for kind in ("css", "js")}
    assert len(pages) > 2
    assert pages <= set(names)
    assert not [name for name in names if name.endswith(".png")]
    assert not [name for name in names if name.startswith(("tests/", "integration/", "patches/"))]
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert all(group in text for group in ("verl.plugins", "vllm.general_plugins", "console_scripts"))


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an environment that has the wheel and what it depends on: no torch, no framework."""
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    pip("install", str(wheel), python=folder / "venv" / "bin" / "python")
    (folder / "run").mkdir()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "log_probs.jsonl").touch()
    return folder


def typed(alone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FP16_PATCH", "PYTHON"))}
    program = alone / "venv" / "bin" / "fp16-patch"
    shown = subprocess.run([program, *arguments], cwd=alone, env=clean, capture_output=True, text=True, check=False)
    assert "Traceback" not in shown.stdout + shown.stderr
    return shown


@pytest.mark.parametrize("command", [*main.commands, None])
def test_help_needs_no_torch(alone: Path, command: str | None) -> None:
    shown = typed(alone, *([command] if command else []), "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("Usage: fp16-patch")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "run"], "report needs torch, which is not installed here. Fix: pip install 'fp16-patch[report]'"),
        (["analyze", "log_probs.jsonl"], "analyze needs torch, which is not installed here. Fix: pip install 'fp16-pa"),
        (["watch"], "Fix: pip install 'fp16-patch[report]'"),
        (["watch", "run", "--once"], "Fix: pip install 'fp16-patch[report]'"),
        (
            ["settings", "--", "python", "-m", "verl.trainer.main_ppo"],
            "it runs verl, which is not installed here. Fix: pip install",
        ),
        (["demo"], "the demo is in the source checkout"),
        (["diff", "--source", "run"], "run: holds no code that is patched"),
        (["run", "--", "no-such-program"], "no-such-program: no such program"),
        (["matrix", "--add", "verl==0.9.1"], "this is an installed package. Fix: add releases in a checkout"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_missing_is_one_line(alone: Path, arguments: list[str], said: str) -> None:
    shown = typed(alone, *arguments)
    assert (shown.returncode, shown.stdout) == (1, "")
    (line,) = shown.stderr.splitlines()
    assert line.startswith("Error: ")
    assert said in line


def test_a_probe_that_cannot_be_has_an_exit_code_of_its_own(alone: Path) -> None:
    shown = typed(alone, "probe", "model")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert (
        shown.stderr == "Error: probe needs torch, which is not installed here. Fix: pip install 'fp16-patch[probe]'\n"
    )


def test_a_model_that_is_not_there_is_said_before_torch_is_asked_for(alone: Path) -> None:
    shown = typed(alone, "probe", "Qwen/Qwen2.5-0.5B")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("Error: MODEL=Qwen/Qwen2.5-0.5B: no config.json there. Fix: give the folder")


def test_what_needs_no_torch_works_without(alone: Path) -> None:
    settings, matrix, run = (
        typed(alone, "settings"),
        typed(alone, "matrix"),
        typed(alone, "run", "--", "echo", "trained"),
    )
    assert (settings.returncode, "growth_interval" in settings.stdout) == (0, True)
    assert (matrix.returncode, "engine-dtype" in matrix.stdout) == (0, True)
    assert (run.returncode, run.stdout) == (0, "trained\n")
    module = [alone / "venv" / "bin" / "python", "-m", "fp16_patch", "--version"]
    assert __version__ in subprocess.run(module, cwd=alone, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ([], "neither verl nor OpenRLHF is installed here. Fix: pip install 'fp16-patch[verl]' or 'fp16-patch[openrl"),
        (["--", "python", "-m", "verl.trainer.main_ppo"], "verl is not installed here, but the command runs it."),
        (
            ["--", "python", "-m", "openrlhf.cli.train_ppo_ray"],
            "openrlhf is not installed here, but the command runs it",
        ),
    ],
    ids=["machine", "verl", "openrlhf"],
)
def test_doctor_names_the_framework_to_install(alone: Path, command: list[str], first: str) -> None:
    shown = typed(alone, "doctor", *command)
    assert (shown.returncode, shown.stderr) == (1, "")
    assert shown.stdout.startswith(f"not fit: {first}")
