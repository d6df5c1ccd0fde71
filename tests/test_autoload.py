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


def refused(statements: str, **env: str) -> list[str]:
    """What a process prints in which nothing of ours can be activated, but by `statements`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    run = subprocess.run(
        [sys.executable, "-c", f"import sys, types\n{statements}"], env={**clean, **env}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# As both frameworks do: what a lookup raises is logged, and what vLLM finds is called.
LOOK_UP = """
from importlib.metadata import entry_points
found = []
for group in ("verl.plugins", "vllm.general_plugins"):
    for point in entry_points(group=group):
        if point.name == "fp16_patch":
            try:
                found.append(point.load())
            except Exception as failure:
                print("logged:", failure)
for name in ("verl", "verl.trainer"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for action in (*found, lambda: __import__("verl.trainer.main_ppo"), lambda: __import__("verl.trainer.main_ppo")):
    try:
        action()
    except Exception as failure:
        print(type(failure).__name__, failure)
"""


@pytest.mark.parametrize(
    ("breakage", "mode", "said"),
    [
        ("sys.modules['wrapt'] = None", "fp16", "import of wrapt halted"),
        ("sys.modules['packaging.version'] = types.ModuleType('packaging.version')", "observe", "cannot import name"),
        ("", "fp8", "FP16_PATCH=fp8: no such mode"),
    ],
)
def test_a_plugin_that_fails_leaves_no_process_to_train(breakage: str, mode: str, said: str) -> None:
    logged, of_vllm, *of_verl = refused(breakage + LOOK_UP, FP16_PATCH=mode)
    assert logged.startswith("logged: ")
    assert said in logged
    # vLLM calls what it has found, and passes on what that raises.
    assert said in of_vllm
    assert len(of_verl) == 2
    assert all("verl.trainer.main_ppo is not imported: fp16_patch" in line for line in of_verl)


def test_off_against_a_carried_plan_is_told_and_refuses_nothing() -> None:
    from fp16_patch import Plan

    carried = {"FP16_PATCH": "off", "FP16_PATCH_PLAN": Plan().to_json()}
    assert refused(LOOK_UP, **carried) == ["ModuleNotFoundError No module named 'verl.trainer.main_ppo'"] * 2
    assert (
        refused("sys.modules['wrapt'] = None" + LOOK_UP, **carried)
        == ["ModuleNotFoundError No module named 'verl.trainer.main_ppo'"] * 2
    )
