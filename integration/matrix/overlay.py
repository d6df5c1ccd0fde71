"""A release of a framework that goes before an environment's own on the search path, without what it depends on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from integration.matrix.versions import ROOT, Tested

OVERLAYS = ROOT / "build" / "releases"


def overlay(release: Tested) -> Path:
    """The folder for `PYTHONPATH`, made on first use."""
    folder = OVERLAYS / f"{release.package}-{release.version}"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _install(release, unfinished)
        unfinished.rename(folder)
    return folder


def _install(release: Tested, into: Path) -> None:
    pip = [str(release.environment.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--target", str(into), str(release)], check=True)
    # Wheels of these frameworks bring top-level packages such as `tests`, which would hide ours.
    for path in into.iterdir():
        if path.name != release.package and not path.name.startswith(f"{release.package}-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
