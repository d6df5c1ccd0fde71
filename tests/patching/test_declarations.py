"""Declared patches against sources of every kind: known, changed, moved, gone, of a release that does without."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from fp16_patch import Plan
from fp16_patch.patching import declarations
from fp16_patch.patching.apply import PatchSet
from fp16_patch.patching.code_object_patch import SPELLINGS
from fp16_patch.patching.declarations import Patch, Status, Variant, declared_patches, nearest
from fp16_patch.patching.fingerprint import fingerprint
from fp16_patch.plan.errors import PatchError

PATCHES = declared_patches()
each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)

OLD, NEW = "def inside():\n    return 1\n", "def apart():\n    return 2\n"
MOVED = """why    = "Because."
retire = "never"
target = "verl.new:apart"
hook   = "fp16_patch.verl.fsdp.engine:optimizer_step"

[exempt]
"==0.7.0" = {{ native = "it was right once" }}

[releases]
"0.9.0" = "{new}"

[[variant]]
target = "verl.old:inside"
edit   = ["torch.bfloat16"]

[variant.releases]
"0.8.0" = "{old}"
"""


class Modules:
    """Sources held in memory."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules = modules

    def read(self, module: str) -> str | None:
        return self.modules.get(module)


@pytest.fixture
def moved(tmp_path: Path) -> Patch:
    """A defect that sits in a function of its own since 0.9.0, and inside another before."""
    path = tmp_path / "verl" / "moved.toml"
    path.parent.mkdir()
    path.write_text(MOVED.format(new=fingerprint(NEW, "apart"), old=fingerprint(OLD, "inside")))
    return Patch.from_toml(path)


@each_patch
def test_a_patch_says_why_and_until_when(patch: Patch) -> None:
    assert len(patch.why) > 20
    assert patch.retire
    assert patch.releases


@each_patch
def test_a_release_is_in_one_variant(patch: Patch) -> None:
    named = [release for variant in patch.variants for release in variant.releases]
    assert len(named) == len(set(named))
    assert all(variant.package == patch.package for variant in patch.variants)
    assert all(spelling in SPELLINGS for variant in patch.variants for spelling in variant.edit)


def test_names_tell_patches_apart() -> None:
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)


@each_patch
def test_other_code_is_unknown_and_refused(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in patch.variants:
        *classes, name = variant.qualname.split(".")
        source = "".join(f"{'    ' * depth}class {each}:\n" for depth, each in enumerate(classes))
        source += f"{'    ' * len(classes)}def {name}(): return 'other code'\n"
        verdict = patch.judge(Modules({variant.module: source}), None)
        assert (verdict.status, verdict.unknown) == (Status.CHANGED, True)
    gone = patch.judge(Modules({}), None)
    assert gone.status is Status.MISSING

    release = str(nearest(patch.releases, None))
    monkeypatch.setattr(declarations, "installed_release", lambda _package: release)
    monkeypatch.setattr(declarations, "Installed", lambda: Modules({}))
    with pytest.raises(PatchError, match=rf"{patch.name}: .* {re.escape(release)} .*FP16_PATCH_STRICT=0"):
        PatchSet((patch,)).install()


@each_patch
def test_without_its_framework_it_is_absent_and_harms_nothing(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declarations, "installed_release", lambda _package: None)
    patches = PatchSet((patch,))
    patches.install()
    assert patches.report() == {patch.name: "absent"}
    patches.undo()


@pytest.mark.parametrize(
    ("sources", "release", "status", "target"),
    [
        ({"verl.new": NEW}, "0.9.0", Status.APPLIES, "verl.new:apart"),
        ({"verl.old": OLD}, "0.8.0", Status.APPLIES, "verl.old:inside"),
        ({"verl.old": OLD}, None, Status.APPLIES, "verl.old:inside"),  # a fork
        ({"verl.old": OLD}, "0.8.1", Status.APPLIES, "verl.old:inside"),  # a release that nobody has declared
        ({"verl.new": NEW, "verl.old": OLD}, "0.9.5", Status.APPLIES, "verl.new:apart"),
        ({"verl.new": NEW, "verl.old": OLD}, "0.8.0", Status.APPLIES, "verl.old:inside"),
        ({"verl.old": OLD}, "0.7.0", Status.EXEMPT, "verl.old:inside"),
        ({"verl.new": NEW + "#"}, "0.9.1", Status.APPLIES, "verl.new:apart"),
        ({"verl.new": NEW.replace("2", "3")}, "0.9.1", Status.CHANGED, "verl.new:apart"),
        ({"verl.old": OLD.replace("1", "3")}, "0.9.1", Status.CHANGED, "verl.old:inside"),
        ({}, "0.9.1", Status.MISSING, "verl.new:apart"),
    ],
)
def test_each_source_is_judged_by_the_variant_that_fits_it(
    moved: Patch, sources: dict[str, str], release: str | None, status: Status, target: str
) -> None:
    verdict = moved.judge(Modules(sources), release)
    assert (verdict.status, verdict.variant.target) == (status, target)


def test_one_unknown_patch_keeps_all_off_and_not_strict_warns(moved: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declarations, "installed_release", lambda _package: "0.9.1")
    monkeypatch.setattr(declarations, "Installed", lambda: Modules({"verl.new": "def apart(): return 3"}))
    known = Patch("known", "verl", "why", "retire", (Variant("verl.new:apart", {"0.9.1": "x"}, hook="a:b"),))
    for strict in (True, False):
        patches = PatchSet((moved, known), strict=strict)
        if strict:
            with pytest.raises(PatchError, match="moved: verl.new:apart.*\nknown: "):
                patches.install()
        else:
            patches.install()
        assert not patches.applied
        patches.undo()


@pytest.mark.parametrize("form", [{}, {"hook": "a:b", "edit": ["torch.bfloat16"]}])
def test_a_variant_has_a_hook_or_an_edit(form: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needs a hook or an edit, and not both"):
        Variant.from_toml({"target": "verl.new:apart", "releases": {}, **form})


def test_the_nearest_known_release_is_the_one_before() -> None:
    known = dict.fromkeys(("0.7.0", "0.10.0", "0.8.0"), "x")
    asked = ("0.5.0", "0.7.1", "0.9.9", "1.0", None)
    assert [nearest(known, release) for release in asked] == ["0.7.0", "0.7.0", "0.8.0", "0.10.0", "0.10.0"]
    assert nearest({}, "0.7.0") is None


def test_a_plan_that_only_observes_gets_the_observing_patches() -> None:
    observing = PatchSet.of(Plan(mode="observe")).patches
    assert observing
    assert all(patch.observes for patch in observing)
    assert len(observing) < len(PATCHES)
