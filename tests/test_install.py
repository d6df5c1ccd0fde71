"""What `pip install` of us does to an environment that has everything already."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("hatchling")


def pip(*arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        *arguments,
        "--no-build-isolation",
        "--quiet",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize("extra", ["", "[report]"])
def test_installing_us_changes_nothing_else(extra: str) -> None:
    # Resolves every dependency of ours against what is installed, and reports what would be installed.
    report = json.loads(pip("install", "--dry-run", "--no-index", "--report", "-", f"{ROOT}{extra}"))
    assert [item["metadata"]["name"] for item in report["install"]] == ["fp16-patch"]


def test_the_wheel_carries_patches_types_and_entry_points(tmp_path: Path) -> None:
    pip("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
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
