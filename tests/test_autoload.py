"""What installing us costs those who have not switched it on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

# Both frameworks have these when they look for plugins.
PROBE = """
import importlib.metadata, json, sys, typing
before = set(sys.modules)
import fp16_patch
fp16_patch.load
fp16_patch.load_in_vllm()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def imported(**env: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env={**clean, **env}, capture_output=True, text=True, check=True
    )
    return list(json.loads(run.stdout))


@pytest.mark.parametrize("env", [{}, {"FP16_PATCH": "off"}, {"FP16_PATCH": "0"}], ids=str)
def test_unset_or_off_imports_one_small_file_and_nothing_else(env: dict[str, str]) -> None:
    assert imported(**env) == ["fp16_patch"]


def test_switched_on_it_imports_no_framework_early() -> None:
    new = imported(FP16_PATCH="1")
    assert "fp16_patch.runtime.activation" in new
    assert not {"torch", "ray", "verl", "vllm"} & set(new)


def test_the_entry_points_name_what_exists() -> None:
    for group in ("verl.plugins", "vllm.general_plugins"):
        (ours,) = [point for point in entry_points(group=group) if point.name == "fp16_patch"]
        assert callable(ours.load())
