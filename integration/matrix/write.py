"""Write what follows from `versions.toml` and `patches/`, the table of releases and CI's workflows; and the table of
Megatron's layouts from what `integration.matrix.megatron` found.

    python -m integration.matrix.write

A test says whether they are up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from fp16_patch.patching.declarations import declared_patches
from integration.matrix import megatron_table
from integration.matrix.versions import ROOT, Environment, Tested, others, tested_releases, tested_together
from integration.pages.places import with_table

PAGE = ROOT / "fp16_patch" / "releases" / "README.md"
WORKFLOWS = ROOT / ".github" / "workflows"
_HEAD = "# Written by `python -m integration.matrix.write` from integration/matrix/versions.toml.\n"
_NAMES = {
    "verl": "verl",
    "openrlhf": "OpenRLHF",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "megatron-core": "Megatron-Core",
    "veomni": "VeOmni",
}
_FRAMEWORKS = ("verl", "openrlhf")
_UNPATCHED = dict.fromkeys(("veomni", "megatron-core"), "none: verl's engine has them")
_WORDS = {"fingerprint": "code compared"}
_MINUTES = 90
_REPORT = "A release that the patches do not know"


def written() -> dict[Path, str]:
    """Every file that follows from the data, and what belongs in it."""
    releases = with_table(PAGE.read_text(encoding="utf-8"), table(tested_releases()), "releases")
    layouts = megatron_table.table(json.loads(megatron_table.RESULTS.read_text(encoding="utf-8")))
    workflows = {"test.yml": _test_workflow(), "releases.yml": _releases_workflow()}
    return {
        PAGE: with_table(releases, layouts, "megatron"),
        **{WORKFLOWS / name: _HEAD + _yaml(jobs) for name, jobs in workflows.items()},
    }


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Scripts of several lines stay readable."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def table(releases: list[Tested]) -> str:
    """The releases that are supported, in Markdown: how many patches each gets, how far it is tested."""
    # Neighbours of which the same is to be said share a row.
    alike = [list(group) for _, group in groupby(releases, lambda each: (each.package, _patches_of(each), each.level))]
    rows = [
        f"| {_NAMES[first.package]} {' – '.join(dict.fromkeys((first.version, last.version)))} "
        f"| {_patches_of(first)} | {_WORDS.get(first.level, first.level)} |"
        for first, *_, last in ([*group, group[-1]] for group in alike)
    ]
    return "\n".join(["| release | patches | tested on a CPU |", "|---|---|---|", *rows]) + "\n"


def _patches_of(release: Tested) -> str:
    patches = [patch for patch in declared_patches() if patch.framework == release.package]
    if not patches:
        return _UNPATCHED.get(release.package, "none: its plugin interface")
    # A patch of DeepSpeed or vLLM is declared for their releases, not for the framework's.
    own = [patch for patch in patches if patch.package == release.package]
    applying = sum(release.version in patch.releases for patch in own)
    exempt = sum(patch.exemption_in(release.version) is not None for patch in own)
    return f"{applying}" + (f", {exempt} not needed" if exempt else "")


def _test_workflow() -> dict[str, Any]:
    alone = [name for release in others(tested_releases()) for name in _sessions(release)]
    sessions = [*alone, *(f"together({pair})" for pair in tested_together())]
    environments = _environments()
    jobs = {
        "lint": _job("lint", [{"run": "make lint"}], [environments["verl"]]),
        "verl": _job("verl", [{"run": "make test-verl"}], [environments["verl"]]),
        "openrlhf": _job("OpenRLHF", [{"run": "make test-openrlhf"}], [environments["openrlhf"]]),
        "releases": {
            **_job(
                "${{ matrix.session }}",
                [{"run": "make session NAME='${{ matrix.session }}'"}],
                [*environments.values()],
            ),
            "strategy": {"fail-fast": False, "matrix": {"session": ["fingerprints", "samplers", *sessions]}},
        },
    }
    return {"name": "test", "on": {"push": {"branches": ["main"]}, "pull_request": None}, "jobs": jobs}


def _environments() -> dict[str, Environment]:
    return {release.environment.name: release.environment for release in tested_releases()}


def _sessions(release: Tested) -> Iterator[str]:
    names = {"worker": "worker", "end to end": "end-to-end"}
    for level, session in names.items():
        if release.reaches(level):
            yield f"{session}({release.package}-{release.version})"


def _releases_workflow() -> dict[str, Any]:
    """Once a week: do the patches hold for the newest release of each framework? If not, an issue says what changed."""
    check = "\n".join(
        [
            "make .venv/.ready",
            f"for package in {' '.join(_FRAMEWORKS)}; do",
            '  .venv/bin/fp16-patch matrix --check "$package" >> report.txt 2>&1 || touch changed',
            "done",
            "cat report.txt",
        ]
    )
    report = "\n".join(
        [
            "test -e changed || exit 0",
            f"gh issue list --search 'in:title \"{_REPORT}\"' --json number --jq '.[].number' | grep -q . ||",
            f"gh issue create --title '{_REPORT}' --body-file report.txt",
        ]
    )
    steps = [{"run": check}, {"run": report, "env": {"GH_TOKEN": "${{ github.token }}"}}]
    job = _job("newest releases", steps, [_environments()["verl"]])
    job["permissions"] = {"contents": "read", "issues": "write"}
    return {
        "name": "releases",
        "on": {"schedule": [{"cron": "17 5 * * 1"}], "workflow_dispatch": None},
        "jobs": {"newest": job},
    }


def _job(name: str, steps: list[Mapping[str, Any]], environments: Sequence[Environment]) -> dict[str, Any]:
    cache = {
        "path": "\n".join(environment.folder for environment in environments),
        "key": "-".join(
            [
                *(environment.name for environment in environments),
                *(f"${{{{ hashFiles('{environment.lock}', 'pyproject.toml') }}}}" for environment in environments),
            ]
        ),
    }
    return {
        "name": name,
        "runs-on": "ubuntu-latest",
        "timeout-minutes": _MINUTES,
        # Where pip finds PyTorch's CPU builds.
        "env": {"PIP_EXTRA_INDEX_URL": "${{ vars.PIP_EXTRA_INDEX_URL }}"},
        "steps": [
            {"uses": "actions/checkout@v4"},
            {"uses": "actions/setup-python@v5", "with": {"python-version": "3.11"}},
            {"uses": "actions/cache@v4", "with": cache},
            *steps,
        ],
    }


def main() -> None:
    for path, text in written().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
