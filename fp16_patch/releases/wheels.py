"""Reads releases of a framework that are not installed from their wheels."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.utils import parse_wheel_filename

from fp16_patch.patching.sources import MAX_SOURCE_BYTES, Source, file_names
from fp16_patch.plan.errors import SourceError


class Wheel:
    """Holds the modules of a wheel that is not installed.

    Raises:
        SourceError: it is none, or a module in it is larger than any of a framework.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as problem:
            raise SourceError(f"{path.name}: no wheel: {problem}. {_FIX}") from problem
        # Some wheels keep their packages under `name-release.data/purelib/`.
        self._members = {name.partition(".data/purelib/")[2] or name: name for name in self._archive.namelist()}

    def read(self, module: str) -> str | None:
        for name in file_names(module.split(".")):
            if name in self._members:
                return Source.of(self._content(self._members[name]), name).python(name)
        return None

    def _content(self, member: str) -> bytes:
        if self._archive.getinfo(member).file_size > MAX_SOURCE_BYTES:
            raise SourceError(f"{member}: larger than {MAX_SOURCE_BYTES} bytes, and no module of a framework")
        return self._archive.read(member)


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
