"""Reads releases of a framework that are not installed from their wheels."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.utils import parse_wheel_filename

from fp16_patch.patching.sources import file_names
from fp16_patch.plan.errors import SourceError


class Wheel:
    """Holds the modules of a wheel that is not installed."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        # Some wheels keep their packages under `name-release.data/purelib/`.
        self._members = {name.partition(".data/purelib/")[2] or name: name for name in self._archive.namelist()}

    def read(self, module: str) -> str | None:
        for name in file_names(module.split(".")):
            if name in self._members:
                return self._archive.read(self._members[name]).decode("utf-8")
        return None


def download(package: str, release: str, into: Path) -> Wheel:
    """Download the wheel of a release, without what it depends on, as pip finds it.

    Raises:
        SourceError: pip finds no wheel of it; the message ends with pip's.
    """
    return Wheel(_download(f"{package}=={release}", into))


def newest(package: str) -> str:
    """Return the newest release of which pip finds a wheel for this Python.

    Raises:
        SourceError: there is none.
    """
    with TemporaryDirectory() as folder:
        return str(parse_wheel_filename(_download(package, Path(folder)).name)[1])


_FIX = "Fix: check name and release, or give a source tree, `fp16-patch doctor --source PATH`"


def _download(requirement: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if result.returncode or not wheels:
        said = ([line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel"])[-1]
        raise SourceError(f"{requirement}: pip cannot download a wheel of it: {said}. {_FIX}")
    return wheels[0]
