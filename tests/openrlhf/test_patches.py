"""OpenRLHF's patches against the installed release: they know it, and come off again."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

pytestmark = pytest.mark.openrlhf
pytest.importorskip("openrlhf")

import fp16_patch
from fp16_patch import Plan
from fp16_patch.activation import attestation, owed_patches
from fp16_patch.patching import Patch, PatchSet, Status, installed_release

RELEASE = str(installed_release("openrlhf"))
DECLARED = [patch for patch in PatchSet.declared(changes=True, strict=True).patches if patch.framework == "openrlhf"]
EXEMPT = [patch for patch in DECLARED if patch.package == "openrlhf" and patch.exemption_in(RELEASE) is not None]
PATCHES = [patch for patch in DECLARED if patch not in EXEMPT]


def symbol(patch: Patch) -> Any:
    owner: Any = import_module(patch.module)
    *path, name = patch.qualname.split(".")
    for part in path:
        owner = getattr(owner, part)
    return vars(owner).get(name, getattr(owner, name))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_applies_to_the_installed_release(patch: Patch) -> None:
    verdict = patch.verify()
    assert verdict.status is Status.APPLIES, verdict
    if patch.package == "openrlhf":
        assert verdict.fingerprint == patch.releases[RELEASE]


def test_what_the_installed_release_does_without_is_neither_applied_nor_owed() -> None:
    fp16_patch.activate(Plan())
    exempt = {patch.name for patch in EXEMPT}
    owed = {name for kind in ("worker", "task_runner") for name in owed_patches("openrlhf", kind)}
    assert {name for name, state in attestation()["patches"].items() if state == "exempt"} == exempt
    assert owed
    assert not exempt & owed


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_on_and_off_leaves_the_framework_as_it_was(patch: Patch) -> None:
    before = symbol(patch)
    fp16_patch.activate(Plan())
    assert symbol(patch) is not before
    fp16_patch.deactivate()
    assert symbol(patch) is before
