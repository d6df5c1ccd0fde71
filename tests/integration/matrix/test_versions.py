"""The tested releases: what follows from them is up to date, and they are the ones the patches are declared for."""

from __future__ import annotations

from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

from fp16_patch.patching.declarations import declared_patches
from fp16_patch.releases.matrix import known_releases
from integration.matrix import overlay, versions, write
from integration.matrix.versions import LEVELS, ROOT


@pytest.mark.parametrize(("path", "text"), write.written().items(), ids=lambda value: getattr(value, "name", ""))
def test_what_follows_from_the_data_is_up_to_date(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "run `python -m integration.matrix.write`"


def test_make_test_runs_what_its_environments_hold() -> None:
    run = {str(release) for release in versions.tested_releases()} - {
        str(release) for release in versions.others(versions.tested_releases())
    }
    locked = {"verl==0.9.1", "openrlhf==0.11.2", "sglang==0.5.12", "megatron-core==0.16.1"}
    assert {name for name in run if not name.startswith("vllm")} == locked


@pytest.mark.parametrize("framework", ["verl", "openrlhf"])
def test_supported_is_what_every_patch_covers(framework: str) -> None:
    patches = [patch for patch in declared_patches() if patch.framework == patch.package == framework]
    covered = {
        release
        for release in known_releases(patches)
        if all(release in patch.releases or patch.exemption_in(release) for patch in patches)
    }
    assert covered == {release.version for release in versions.tested_releases() if release.package == framework}


def test_an_exemption_by_another_patch_names_one_that_is_there() -> None:
    patches = {patch.name: patch for patch in declared_patches()}
    for patch in patches.values():
        for exemption in patch.exempt:
            if exemption.reason.value != "fixed_by":
                continue
            others = known_releases([patches[exemption.text]])
            assert [release for release in others if exemption.covers(release)], f"{patch.name}: {exemption}"


def test_each_environment_holds_one_tested_release_and_runs_tests_that_exist() -> None:
    releases = versions.tested_releases()
    for environment in {release.environment.name: release.environment for release in releases}.values():
        here = [release for release in releases if release.environment == environment and release.locked]
        held = [release for release in here if "worker" not in release.elsewhere]
        deepest = [level for level in LEVELS if environment.tests.get(level)][-1]
        assert [release.level for release in held] == [deepest]
        assert all((ROOT / path).exists() for paths in environment.tests.values() for path in paths)


def test_a_level_is_tested_elsewhere_where_the_release_says_so() -> None:
    (old,) = (release for release in versions.tested_releases() if str(release) == "verl==0.7.1")
    (worker, _), (whole, tests) = old.tests("worker"), old.tests("end to end")
    assert (worker.name, whole.name) == ("verl-old", "verl")
    assert tests
    assert all((ROOT / path).exists() for path in tests)


def test_what_is_tested_together_names_tests_that_exist_and_is_not_what_an_environment_holds() -> None:
    for pair in versions.tested_together():
        assert pair.release.companions or not pair.release.locked
        assert all((ROOT / test.partition("::")[0]).exists() for test in pair.tests)


def test_an_overlay_holds_the_framework_and_nothing_that_hides_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = next(release for release in versions.tested_releases() if release.package == "verl")

    def install(command: list[str], **_settings: object) -> None:
        into = Path(command[command.index("--target") + 1])
        for name in ("verl", f"verl-{release.version}.dist-info", "tests", "scripts"):
            (into / name).mkdir(parents=True)

    monkeypatch.setattr(overlay, "OVERLAYS", tmp_path)
    monkeypatch.setattr(overlay.subprocess, "run", install)
    folder = overlay.overlay(release)
    assert sorted(path.name for path in folder.iterdir()) == ["verl", f"verl-{release.version}.dist-info"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert overlay.overlay(release) == folder


def test_companions_have_a_folder_of_their_own_and_keep_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = next(pair for pair in versions.tested_together() if pair.release.companions)

    def install(command: list[str], **_settings: object) -> None:
        assert set(pair.release.companions) < set(command)
        for name in ("verl", "megatron", "mbridge", "tests"):
            (Path(command[command.index("--target") + 1]) / name).mkdir(parents=True)

    monkeypatch.setattr(overlay, "OVERLAYS", tmp_path)
    monkeypatch.setattr(overlay.subprocess, "run", install)
    folder = overlay.overlay(pair.release)
    assert "megatron-core-" in folder.name
    assert sorted(path.name for path in folder.iterdir()) == ["mbridge", "megatron", "verl"]


def test_the_readme_names_the_oldest_and_the_newest_release() -> None:
    """Its summary is written by hand: four ranges."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for package, name in {"verl": "verl", "openrlhf": "OpenRLHF", "vllm": "vLLM", "sglang": "SGLang"}.items():
        known = [release.version for release in versions.tested_releases() if release.package == package]
        assert f"{name} {known[0]} to {known[-1]}" in readme
