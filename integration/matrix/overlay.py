"""A release of a framework that goes before an environment's own on the search path, with its companions only."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from integration.matrix.versions import ROOT, Tested

OVERLAYS = ROOT / "build" / "releases"


def overlay(release: Tested) -> Path:
    """The folder for `PYTHONPATH`, made on first use."""
    companions = [requirement.replace("==", "-") for requirement in release.companions]
    folder = OVERLAYS / "-".join([release.package, release.version, *companions])
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _install(release, unfinished)
        unfinished.rename(folder)
    return folder


def _install(release: Tested, into: Path) -> None:
    pip = [str(release.environment.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # DeepSpeed comes as source, and is built here without its kernels, which it compiles when they are first used.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    wanted = (release.requirement, *release.companions)
    requirements = ["--use-pep517", "--no-deps", "--target", str(into), *wanted]
    subprocess.run([*pip, *requirements], env=environment, check=True)
    # Wheels of these frameworks bring top-level packages such as `tests`, which would hide ours.
    names = [requirement.partition("==")[0] for requirement in wanted]
    # The package `megatron` is distributed as megatron-core.
    packages = {release.package, *(name.replace("-", "_") for name in names), *(name.split("-")[0] for name in names)}
    for path in into.iterdir():
        if path.name.partition("-")[0].partition(".")[0] not in packages:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
