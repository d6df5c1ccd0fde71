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
from fp16_patch.patching.declarations import NoThread, Patch, Status, Variant, declared_patches, nearest
from fp16_patch.patching.fingerprint import fingerprint
from fp16_patch.plan.errors import PatchError

PATCHES = declared_patches()
each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)

OLD, NEW = "def inside():\n    return 1\n", "def apart():\n    return 2\n"
MOVED = """why    = "Because."
upstream = "not reported"
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
def test_a_patch_names_what_the_framework_knows_of_the_defect_or_says_that_there_is_nothing(patch: Patch) -> None:
    framework = {
        "verl": ("verl-project/verl", "NVIDIA/Megatron-LM"),
        "openrlhf": ("OpenRLHF/OpenRLHF", "deepspeedai/DeepSpeed"),
    }
    assert all(thread.partition("#")[0] in framework[patch.framework] for thread in patch.threads)
    assert patch.threads or patch.upstream in NoThread
    assert patch.observes or patch.upstream is not NoThread.OURS


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


SMALL = """target = "verl.new:apart"
hook   = "a:b"
why    = "Because."
retire = "never"
{more}
[releases]
"0.9.0" = "x"
"""
REPORTED = 'upstream = ["verl-project/verl#1"]\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `patches/` that is still empty."""
    monkeypatch.setattr(declarations, "patches_dir", lambda: tmp_path)
    for framework in ("verl", "openrlhf"):
        (tmp_path / framework).mkdir()
    return tmp_path


def declare(folder: Path, more: str, name: str = "verl/small") -> None:
    (folder / f"{name}.toml").write_text(SMALL.format(more=more))


@pytest.mark.parametrize(
    ("more", "upstream"),
    [
        ('upstream = ["verl-project/verl#1", "a.b/c-d#22"]', ("verl-project/verl#1", "a.b/c-d#22")),
        ('upstream = "not reported"', NoThread.NOT_REPORTED),
        ('upstream = "ours"\nobserves = true', NoThread.OURS),
    ],
)
def test_what_a_framework_knows_of_a_defect_is_declared(folder: Path, more: str, upstream: object) -> None:
    declare(folder, more)
    (patch,) = declared_patches()
    assert patch.upstream == upstream
    assert patch.threads == (upstream if isinstance(upstream, tuple) else ())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", r'small.toml: names no issue or pull request of the framework .* Fix: name them, upstream = \["owner'),
        ("observes = true", "names no issue or pull request"),
        ("upstream = []", "names no issue or pull request"),
        ('upstream = "verl-project/verl#1"', r"upstream='verl-project/verl#1' of the framework"),
        ('upstream = ["https://somewhere/verl/1"]', r"upstream=\['https"),
        ('upstream = ["verl#1"]', r"upstream=\['verl#1'\]"),
        ('upstream = "ours"', 'small.toml: upstream="ours" is for patches that observe. Fix: upstream="not reported"'),
        (REPORTED + "upstreams = []", "small.toml: .*unexpected keyword argument 'upstreams'"),
        (REPORTED + 'groups = ["workers"]', "no group 'workers' of verl, there are: none. Fix: declare it in .*groups"),
        (REPORTED + "why", "small.toml: "),
    ],
)
def test_what_a_declaration_lacks_is_said_with_its_file(folder: Path, more: str, message: str) -> None:
    declare(folder, more)
    with pytest.raises(ValueError, match=message):
        declared_patches()


GROUPS = """[verl.workers]
">=0.8" = { unaffected = "the workers are gone" }
"==0.5.0" = { native = "it is right" }

[openrlhf.workers]
"<1" = { native = "of another framework" }
"""


@pytest.mark.parametrize(
    ("groups", "release", "why"),
    [
        ('["workers"]', "0.9.0", "unaffected: the workers are gone"),
        ('["workers"]', "0.5.0", "native: it is right"),
        ('["workers"]', "0.7.0", None),
        ('["other", "workers"]', "0.9.0", "refused: nobody allows it"),  # the first that says something
        ('["workers", "other"]', "0.7.0", "refused: nobody allows it"),
        ("[]", "0.9.0", None),
    ],
)
def test_a_groups_exemptions_are_its_patches(folder: Path, groups: str, release: str, why: str | None) -> None:
    (folder / "groups.toml").write_text(GROUPS + '[verl.other]\n">=0.7" = { refused = "nobody allows it" }\n')
    declare(folder, f"{REPORTED}groups = {groups}")
    (patch,) = declared_patches()
    assert (str(patch.exemption_in(release)) if patch.exemption_in(release) else None) == why


def test_a_patchs_own_exemptions_go_before_its_groups(folder: Path) -> None:
    (folder / "groups.toml").write_text(GROUPS)
    declare(folder, REPORTED + 'groups = ["workers"]\n[exempt]\n"==0.8.*" = { native = "it is right at last" }')
    (patch,) = declared_patches()
    said = {release: str(patch.exemption_in(release)) for release in ("0.8.1", "0.9.0")}
    assert said == {"0.8.1": "native: it is right at last", "0.9.0": "unaffected: the workers are gone"}


def test_no_exemption_is_written_twice() -> None:
    own: dict[tuple[str, str, str], list[str]] = {}
    for path in sorted(declarations.patches_dir().glob("*/*.toml")):
        for releases, reason in declarations.tomllib.loads(path.read_text()).get("exempt", {}).items():
            own.setdefault((path.parent.name, releases, str(reason)), []).append(path.stem)
    assert {exemption: names for exemption, names in own.items() if len(names) > 1} == {}


def test_every_group_has_patches() -> None:
    folder = declarations.patches_dir()
    groups = declarations.tomllib.loads((folder / "groups.toml").read_text())
    for framework, names in groups.items():
        used = [
            declarations.tomllib.loads(path.read_text()).get("groups", ())
            for path in (folder / framework).glob("*.toml")
        ]
        assert {name for each in used for name in each} == set(names)


def test_two_frameworks_have_no_patch_of_one_name(folder: Path) -> None:
    for framework in ("verl", "openrlhf"):
        declare(folder, REPORTED, f"{framework}/small")
    with pytest.raises(ValueError, match="small: openrlhf and verl both have a patch of this name. Fix: rename one"):
        declared_patches()
