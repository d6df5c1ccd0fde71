"""What installing us costs those who have not switched it on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

PROBE = """
import json, sys
before = set(sys.modules)
from fp16_patch import autoload
autoload.load()
autoload.load_in_vllm()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def imported(**env: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env={**clean, **env}, capture_output=True, text=True, check=True
    )
    return list(json.loads(run.stdout))


@pytest.mark.parametrize("env", [{}, {"FP16_PATCH": "off"}, {"FP16_PATCH": "0"}], ids=str)
def test_unset_or_off_imports_two_small_files_and_nothing_else(env: dict[str, str]) -> None:
    ours = {"fp16_patch", "fp16_patch.autoload"}
    new = set(imported(**env))
    assert ours <= new
    assert not [name for name in new - ours if name.startswith(("fp16_patch", "torch", "ray", "verl", "vllm", "wrapt"))]


def test_switched_on_it_imports_no_framework_early() -> None:
    new = imported(FP16_PATCH="1")
    assert "fp16_patch.activation" in new
    assert not {"torch", "ray", "verl", "vllm"} & set(new)


def test_the_entry_points_name_what_exists() -> None:
    for group in ("verl.plugins", "vllm.general_plugins"):
        (ours,) = [point for point in entry_points(group=group) if point.name == "fp16_patch"]
        assert callable(ours.load())
