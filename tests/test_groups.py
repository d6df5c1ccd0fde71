"""A test that ends its process fails alone: the tests beside it run, and pytest ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

ROOT = Path(__file__).parents[1]
CONFTEST = """
from tests.groups import Groups

def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False
    return Groups(lambda nodeid: nodeid.partition("::")[0], config, log)
"""
TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(4))
def test_one(number):
    time.sleep(0.02)
    if number == {fatal}:
        os._exit(1)
"""


@pytest.mark.parametrize("fatal", [1, 3], ids=["in the middle of a group", "at the end of a group"])
def test_a_test_that_ends_its_process_fails_alone(tmp_path: Path, fatal: int) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for number, ends in enumerate([None, fatal, None, None]):
        (tmp_path / f"test_{number}.py").write_text(TESTS.format(fatal=ends))
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-n", "2", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=240)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed, 15 passed" in result.stdout
