"""Every job that a folder of public command lines holds is judged: fit, or refused by a named setting with a fix.

`JOBS_FOR_TESTS` names the folder; without it nothing here runs. It holds files `verl-0.8.0.jsonl`: framework and
release, and in each line a JSON object with `argv`, the words of one command. Each file is judged by the release that
it names, from its wheel where that is not the installed one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fp16_patch
from fp16_patch.patching.declarations import installed_release

FOLDER = os.environ.get("JOBS_FOR_TESTS")
FILES = sorted(Path(FOLDER).glob("*.jsonl")) if FOLDER else []
LONGEST_PROBLEM = 600

pytestmark = pytest.mark.skipif(not FILES, reason="JOBS_FOR_TESTS names no folder of jobs")
pytest.importorskip("hydra")

# The machine is examined once; of a job that hydra or argparse rejects, the fix is applied, and it is judged again.
JUDGE = """
import copy, json, re, sys
from fp16_patch.doctor import examination
from fp16_patch.plan.plan import Plan

machine = examination._examine_machine(Plan(), {})
examination._examine_machine = lambda plan, environ: copy.deepcopy(machine)

def mended(words, problem):
    key = problem.partition("=")[0]
    if plus := re.search(r"Fix: leave the \\+ out: (.*)$", problem):
        return [plus[1] if word.partition("=")[0] == key else word for word in words]
    near = re.search(r"did you mean (\\S+)\\?", problem)
    name = problem.removeprefix("command=").partition(":")[0] if key == "command" else key
    if near:
        return [near[1] + word[len(name):] if word.partition("=")[0] == name else word for word in words]
    rejected = [word for word in words if word.partition("=")[0] == name] if "leave it out" in problem else []
    return [word for word in words if word not in rejected]

verdicts = open(sys.argv[2], "w", encoding="utf-8")
for line in open(sys.argv[1], encoding="utf-8"):
    words = json.loads(line)["argv"]
    problems = examination.examine(Plan(), words).problems
    helped, again = [], []
    for problem in problems:
        better = mended(words, problem)
        helped += [problem] if better != words else []
        words = better
    again = examination.examine(Plan(), words).problems if helped else []
    verdict = {"argv": json.loads(line)["argv"], "problems": problems, "mended": helped, "again": again}
    print(json.dumps(verdict), file=verdicts, flush=True)
"""


def judged(file: Path, into: Path) -> list[dict[str, Any]]:
    framework, _, release = file.stem.partition("-")
    path = [str(Path(fp16_patch.__file__).parents[1])]
    if installed_release(framework) != release:
        path.insert(0, str(unpacked(framework, release, into)))
    env = {**os.environ, "FP16_PATCH": "off", "PYTHONPATH": os.pathsep.join(path)}
    verdicts = into / "verdicts.jsonl"
    command = [sys.executable, "-c", JUDGE, str(file), str(verdicts)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=into)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in verdicts.read_text(encoding="utf-8").splitlines()]


def unpacked(framework: str, release: str, into: Path) -> Path:
    from fp16_patch.releases.wheels import download

    download(framework, release, into)
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return next(into.glob("*.data/purelib"), into)


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.stem)
def jobs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return judged(request.param, tmp_path_factory.mktemp("release"))


def test_every_job_is_fit_or_refused_by_a_named_setting(jobs: list[dict[str, Any]]) -> None:
    assert any(not of_the_command(job["problems"]) for job in jobs)
    for job in jobs:
        for problem in of_the_command(job["problems"]):
            setting, separator, reason = problem.partition(": ")
            assert separator and "=" in setting, problem
            assert ". Fix: " in reason, problem
            assert len(problem) < LONGEST_PROBLEM and "\n" not in problem, problem
            assert is_named(setting, job["argv"]), problem


def test_a_fix_that_can_be_applied_helps(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        assert not set(job["mended"]) & set(job["again"]), job["mended"]


def of_the_command(problems: list[str]) -> list[str]:
    """Leave out what this environment lacks: a job is judged, not the machine."""
    return [problem for problem in problems if "is not installed here" not in problem]


def is_named(setting: str, argv: list[str]) -> bool:
    """Return whether a refusal names a word of the command, or a key that verl's configuration has beside it."""
    key, _, value = setting.partition("=")
    if key != "command":
        return "." in key or key.startswith("--")
    # A program, a launcher, or the beginning of what is no training command.
    return value.split()[0].strip("'") in " ".join(argv)
