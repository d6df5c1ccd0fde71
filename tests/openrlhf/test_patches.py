"""OpenRLHF's patches against the installed release: they know it, and come off again."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

pytestmark = pytest.mark.openrlhf
pytest.importorskip("openrlhf")

import fp16_patch
from fp16_patch import Plan
from fp16_patch.patching import Patch, PatchSet, Status

PATCHES = [patch for patch in PatchSet.declared(changes=True, strict=True).patches if patch.framework == "openrlhf"]


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


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_on_and_off_leaves_the_framework_as_it_was(patch: Patch) -> None:
    before = symbol(patch)
    fp16_patch.activate(Plan())
    assert symbol(patch) is not before
    fp16_patch.deactivate()
    assert symbol(patch) is before
