"""The folder `fp16-patch run` puts on PYTHONPATH: a framework's import activates, and no sitecustomize is lost."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fp16_patch

STARTUP = Path(fp16_patch.__file__).parent / "runtime" / "startup"
MODES = ["1", "fp16", "observe", "off", " OFF ", "0", "", "no", "False", "maybe"]
ROOT = Path(fp16_patch.__file__).parents[1]
PROBE = """
import sys
import {0}
print("fp16_patch.runtime.activation" in sys.modules, sys.modules["sitecustomize"].__file__)
"""


def said(tmp_path: Path, *first: Path, framework: str = "openrlhf", **env: str) -> str:
    package = tmp_path / "packages" / framework
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    path = os.pathsep.join(map(str, [*first, STARTUP, tmp_path / "theirs", package.parent, ROOT]))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    command = [sys.executable, "-c", PROBE.format(framework)]
    run = subprocess.run(command, env={**clean, **env, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    return run.stdout


def theirs(tmp_path: Path) -> Path:
    (tmp_path / "theirs").mkdir()
    own = tmp_path / "theirs" / "sitecustomize.py"
    own.write_text("print('theirs ran')\n")
    return own


@pytest.mark.parametrize("framework", ["verl", "openrlhf"])
def test_importing_a_framework_activates_where_asked_to(tmp_path: Path, framework: str) -> None:
    assert said(tmp_path, framework=framework, FP16_PATCH="fp16", FP16_PATCH_STRICT="0").startswith("True")
    assert said(tmp_path, framework=framework).startswith("False")


def test_a_shadowed_sitecustomize_runs_and_keeps_its_name(tmp_path: Path) -> None:
    own = theirs(tmp_path)
    assert said(tmp_path, FP16_PATCH="fp16").splitlines() == ["theirs ran", f"True {own}"]


def test_without_another_ours_keeps_the_name(tmp_path: Path) -> None:
    name = said(tmp_path, FP16_PATCH="fp16").split()[1]
    # The interpreter may have one of its own; it must not be lost either.
    assert name.endswith("sitecustomize.py")


# Without site-packages, as an interpreter that never saw `pip install fp16-patch`.
ALONE = "import sitecustomize; import json; print('goes on'); import {0}"


@pytest.mark.parametrize("framework", ["verl", "openrlhf"])
@pytest.mark.parametrize("root", [ROOT, Path("/nowhere")], ids=["without-wrapt", "without-us"])
def test_where_we_cannot_start_no_framework_trains(tmp_path: Path, framework: str, root: Path) -> None:
    package = tmp_path / framework
    package.mkdir()
    (package / "__init__.py").write_text("print('trains')")
    command = [sys.executable, "-S", "-c", ALONE.format(framework)]
    path = os.pathsep.join(map(str, [STARTUP, tmp_path, root]))

    run = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": path, "FP16_PATCH": "fp16"}, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (1, "goes on\n")
    last = run.stderr.splitlines()[-1]
    assert f"{framework} is not imported: fp16_patch cannot start in {sys.executable} (No module named" in last
    assert "Fix: install fp16-patch there, or set FP16_PATCH=off" in last

    off = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": path, "FP16_PATCH": "off"}, capture_output=True, text=True
    )
    assert (off.returncode, off.stdout) == (0, "goes on\ntrains\n")


def packages(folder: Path, **files: str) -> Path:
    """A folder of packages: their names, and the text of each."""
    for name, text in files.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    return folder


WRAPT = """
hooks = {}
def register_post_import_hook(hook, name):
    hooks[name] = hook
"""
# As wrapt does: a hook is called once, and what it raises ends the import.
IMPORTED = """
import sys
hooks = getattr(sys.modules.get("wrapt"), "hooks", {})
if __name__ in hooks:
    hooks.pop(__name__)(sys.modules[__name__])
print("trains")
"""
TWICE = """
import sitecustomize, json
print("goes on")
for name in ("{0}", "{0}", "{0}.trainer"):
    try:
        __import__(name)
    except Exception as refusal:
        print(type(refusal).__name__, refusal)
"""


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"fp16_patch": "def f(:"}, "SyntaxError: invalid syntax"),
        ({"fp16_patch": "int | 'x'"}, "TypeError: unsupported operand"),
        ({"fp16_patch": "import packaging_of_another_time"}, "No module named 'packaging_of_another_time'"),
        ({"wrapt": "raise AttributeError('half installed')"}, "AttributeError: half installed"),
        ({"fp16_patch": ""}, "No module named 'fp16_patch.verl'"),
    ],
)
def test_whatever_fails_at_the_start_the_framework_is_refused_each_time(
    tmp_path: Path, ours: dict[str, str], said: str
) -> None:
    path = packages(tmp_path / "path", **{"fp16_patch": "", "wrapt": WRAPT, "verl": IMPORTED, **ours})
    (path / "verl" / "trainer.py").write_text("print('trains')")

    def run(**mode: str) -> list[str]:
        environment = {"PYTHONPATH": os.pathsep.join(map(str, [STARTUP, path])), **mode}
        command = [sys.executable, "-S", "-c", TWICE.format("verl")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    for mode in ("fp16", "observe"):
        first, *refused = run(FP16_PATCH=mode)
        assert first == "goes on"
        assert len(refused) == 3
        assert said in refused[0]
        assert all("is not imported: fp16_patch cannot start in" in line for line in refused[1:])
    # Nobody's affair where the process was not asked to compute.
    for off in ({"FP16_PATCH": "off"}, {"FP16_PATCH": "0", "FP16_PATCH_PLAN": "{}"}):
        assert run(**off) == ["goes on", "trains", "trains"]


def test_the_start_and_the_package_agree_on_what_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STARTUP)
    startup = importlib.import_module("fp16_patch_startup")
    try:
        for mode in MODES:
            monkeypatch.setenv("FP16_PATCH", mode)
            assert startup.wanted() == fp16_patch.wanted()
    finally:
        del sys.modules["fp16_patch_startup"]


def test_any_python_of_a_framework_can_read_the_start() -> None:
    for file in STARTUP.glob("*.py"):
        ast.parse(file.read_text(), feature_version=(3, 6))
