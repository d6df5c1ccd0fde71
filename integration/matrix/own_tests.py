"""Runs verl's own unit tests, those that need no GPU, with us loaded: what passes without us is to pass with us.

    python -m integration.matrix.own_tests [FOLDER] [-- PYTEST ARGUMENTS …]

FOLDER holds verl's `tests`; by default they come from the source archive of the installed release. A test that passes
only without us is named, with the first line of what it says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from fp16_patch.patching.declarations import installed_release
from integration.matrix.versions import ROOT

MODES = ("observe", "fp16")
_OF_A_CPU = "*_on_cpu.py"


def tests_of_the_archive(folder: Path) -> Path:
    """Download the source archive of the installed verl, and return the folder that holds its `tests`."""
    release = f"verl=={installed_release('verl')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest"]
    subprocess.run([*pip, str(folder), release], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        wanted = [member for member in members if "/tests/" in member.name]
        members.extractall(folder, wanted, filter="data")
    # Without the package beside it, which would hide the installed one.
    return folder / archive.name.removesuffix(".tar.gz")


def run(mode: str, folder: Path, arguments: Sequence[str]) -> dict[str, str | None]:
    """Run them under a mode; return test → the first line of why it did not pass, None if it did."""
    files = sorted(str(path.relative_to(folder)) for path in (folder / "tests").rglob(_OF_A_CPU))
    with TemporaryDirectory() as reports:
        report = Path(reports) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", "-p", "no:cacheprovider"]
        subprocess.run([*command, *files, *arguments], cwd=folder, env=_environment(mode), check=False)
        return dict(_results(ElementTree.parse(report).getroot()))


def _environment(mode: str) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    return {**others, "FP16_PATCH": mode, "PYTHONPATH": os.pathsep.join([str(ROOT / "integration" / "cpu"), str(ROOT)])}


def _results(report: ElementTree.Element) -> Iterator[tuple[str, str | None]]:
    for case in report.iter("testcase"):
        problems = [*case.iter("failure"), *case.iter("error"), *case.iter("skipped")]
        said = [problem.get("message") or "no message" for problem in problems]
        yield f"{case.get('classname')}::{case.get('name')}", said[0].splitlines()[0] if said else None


def lost(without: Mapping[str, str | None], under: Mapping[str, str | None]) -> dict[str, str]:
    """Return the tests that pass without us and not with us, and why."""
    return {
        name: under.get(name, "not run") or ""
        for name, problem in without.items()
        if problem is None and under.get(name, "not run") is not None
    }


def main(arguments: Sequence[str]) -> int:
    """Print a line for each mode and each test that it loses; 1 if there is one, or if none passes without us."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    with TemporaryDirectory() as downloads:
        folder = Path(arguments[0]) if at else tests_of_the_archive(Path(downloads))
        stock = run("off", folder, arguments[at + 1 :])
        passed = sum(problem is None for problem in stock.values())
        print(f"off: {passed} of {len(stock)} pass", flush=True)
        failed = passed == 0
        for mode in MODES:
            missing = lost(stock, run(mode, folder, arguments[at + 1 :]))
            print(f"{mode}: {passed - len(missing)} of those pass", flush=True)
            for name, why in missing.items():
                print(f"  {name}: {why}", flush=True)
            failed |= bool(missing)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
