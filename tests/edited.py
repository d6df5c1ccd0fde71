"""A copy of an installed package as the owner of a fork would have it: edited by our diff, by the `patch` program."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from fp16_patch import Plan
from fp16_patch.releases.tree_diff import Outcome, diff_of


def edited_copy(packages: tuple[str, ...], folder: Path) -> tuple[str, list[Outcome]]:
    """Put the packages, edited for float16, into a folder that may go on the search path.

    Returns:
        the diff, and what it does of each patch.
    """
    for package in packages:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        installed = next(iter(spec.submodule_search_locations))
        # With its bytecode, which holds for all that is not edited: else every process of a run compiles the package.
        shutil.copytree(installed, folder / package)
    diff, outcomes = diff_of(folder, Plan())
    for program in (["git", "apply", "--check"], ["patch", "-p1", "--silent"]):
        subprocess.run(program, cwd=folder, input=diff.encode(), check=True)
    return diff, outcomes
