"""Releases are wheels made here, and pip is the real one, without a network."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from fp16_patch.cli import main
from fp16_patch.patching import declarations
from fp16_patch.patching.declarations import Status, Verdict
from fp16_patch.patching.fingerprint import fingerprint
from fp16_patch.plan.errors import SourceError
from fp16_patch.releases import matrix, tables
from fp16_patch.releases.matrix import Release

ENGINE = "class Engine:\n    def step(self, x):\n        return x{0}\n\n    def load(self):\n        return {1}\n"
TOML = """target   = "verl.workers.engine:Engine.{name}"
hook     = "fp16_patch.verl.fsdp.engine:hook"
why      = "Because."
upstream = ["verl-project/verl#1", "verl-project/verl#22", "other/engine#333"]
retire   = "never"

[releases]
"0.9.1" = "{fingerprint}"
"""


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's `patches/` with two patches, written for verl 0.9.1 as `release` makes it by default."""
    folder = tmp_path / "patches" / "verl"
    folder.mkdir(parents=True)
    for name in ("step", "load"):
        known = fingerprint(ENGINE.format("", "1"), f"Engine.{name}")
        (folder / f"engine-{name}.toml").write_text(TOML.format(name=name, fingerprint=known))
    monkeypatch.setattr(matrix, "patches_dir", lambda: folder.parent)
    monkeypatch.setattr(declarations, "patches_dir", lambda: folder.parent)
    return folder


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a wheel of verl where pip looks for it, and nowhere else."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    def make(version: str, step: str = "", load: str = "1", purelib: bool = False) -> Path:
        info = f"verl-{version}.dist-info"
        inside = f"verl-{version}.data/purelib/" if purelib else ""
        path = index / f"verl-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{inside}verl/workers/engine/__init__.py", ENGINE.format(step, load))
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: verl\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        return path

    return make


def states(verdicts: list[Verdict]) -> dict[str, Status]:
    return {verdict.patch.name: verdict.status for verdict in verdicts}


@pytest.mark.parametrize("purelib", [False, True])
def test_a_release_is_checked_without_installing_it(
    declared: Path, release: Callable[..., Path], purelib: bool
) -> None:
    release("0.9.2", load="2", purelib=purelib)
    (verdicts,) = matrix.check_releases([Release("verl", "0.9.2")])
    assert states(verdicts) == {"engine-load": Status.CHANGED, "engine-step": Status.APPLIES}
    assert [verdict.like for verdict in verdicts] == [None, "0.9.1"]
    assert not matrix.covered(verdicts)


def test_a_target_that_is_gone_is_not_there(declared: Path, release: Callable[..., Path]) -> None:
    gone = release("0.9.2")
    with zipfile.ZipFile(gone) as wheel:
        members = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("__init__.py")}
    with zipfile.ZipFile(gone, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    (verdicts,) = matrix.check_releases([Release("verl", "0.9.2")])
    assert set(states(verdicts).values()) == {Status.MISSING}


def test_adding_declares_what_holds_and_shows_what_does_not(declared: Path, release: Callable[..., Path]) -> None:
    release("0.9.1")
    release("0.10.0", load="2")
    untouched = (declared / "engine-load.toml").read_text()

    verdicts, diffs = matrix.add_release(Release("verl", "0.10.0"))

    assert (declared / "engine-load.toml").read_text() == untouched
    known = fingerprint(ENGINE.format("", "1"), "Engine.step")
    text = (declared / "engine-step.toml").read_text()
    assert text == TOML.format(name="step", fingerprint=known) + f'"0.10.0" = "{known}"\n'
    assert list(diffs) == ["engine-load"]
    assert "-    return 1\n+    return 2" in diffs["engine-load"]
    assert "Engine.load 0.9.1" in diffs["engine-load"]
    assert matrix.known_releases([verdict.patch for verdict in verdicts]) == ["0.9.1"]
    assert matrix.known_releases(declarations.declared_patches()) == ["0.9.1", "0.10.0"]


def test_adding_twice_changes_nothing_and_older_releases_come_first(
    declared: Path, release: Callable[..., Path]
) -> None:
    release("0.9.0")
    matrix.add_release(Release("verl", "0.9.0"))
    once = (declared / "engine-step.toml").read_text()
    matrix.add_release(Release("verl", "0.9.0"))
    assert (declared / "engine-step.toml").read_text() == once
    assert once.index('"0.9.0"') < once.index('"0.9.1"')


def test_an_installed_package_is_not_written_to(
    declared: Path, release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    release("0.9.2")
    monkeypatch.setattr(matrix, "patches_dir", lambda: Path(matrix.__file__).parents[1] / "patches")
    with pytest.raises(SourceError, match=r"verl==0.9.2: this is an installed package. Fix: .* checkout"):
        matrix.add_release(Release("verl", "0.9.2"))


@pytest.mark.parametrize("text", ["verl>=0.9", "verl==0.9,!=0.9.1", "nonsense==1.0", "== what"])
def test_what_is_not_one_release_is_refused_with_an_example(declared: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"Fix: give one release of verl, such as verl==1.2.3"):
        Release.parse(text)


def test_a_release_that_pip_does_not_find_is_named(declared: Path, release: Callable[..., Path]) -> None:
    shown = CliRunner().invoke(main, ["matrix", "--check", "verl==99.0"])
    assert shown.exit_code == 1
    assert "verl==99.0: pip cannot download a wheel of it: ERROR: No matching distribution" in shown.output


def test_a_source_tree_is_checked_like_a_release(declared: Path, release: Callable[..., Path], tmp_path: Path) -> None:
    shutil.unpack_archive(release("0.9.1", load="2"), tmp_path / "fork" / "src", "zip")
    assert states(matrix.check_tree(tmp_path / "fork")) == {
        "engine-load": Status.CHANGED,
        "engine-step": Status.APPLIES,
    }
    shown = CliRunner().invoke(main, ["doctor", "--source", str(tmp_path / "fork")], env={"COLUMNS": "200"})
    assert shown.exit_code == 1
    assert "of 2 patches, 1 hold, 1 have a target that changed" in shown.output


@pytest.mark.parametrize(
    ("folder", "message"), [("empty", "holds no code that is patched"), ("no", "no such directory")]
)
def test_a_tree_without_a_framework_is_refused(declared: Path, tmp_path: Path, folder: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=f"{message}.* Fix: name the directory"):
        matrix.check_tree(tmp_path / folder)


def test_the_commands_show_what_they_found(declared: Path, release: Callable[..., Path]) -> None:
    release("0.9.1")
    release("0.9.2", load="2")
    show = CliRunner(env={"COLUMNS": "200"})

    shown = show.invoke(main, ["matrix", "--check", "verl==0.9.1"])
    assert (shown.exit_code, "verl==0.9.1: of 2 patches, 2 hold" in shown.output) == (0, True)

    shown = show.invoke(main, ["matrix", "--add", "verl==0.9.2"])
    assert (shown.exit_code, "verl==0.9.2: of 2 patches, 1 hold, 1 have a target that changed" in shown.output) == (
        1,
        True,
    )
    assert "+    return 2" in shown.output

    shown = show.invoke(main, ["matrix"])
    rows = [line.split() for line in shown.output.splitlines() if "engine-" in line]
    # Nobody has said how far 0.9.2 is tested.
    threads = ["#1,", "#22,", "engine#333"]
    assert rows == [["engine-load", "E", "?", *threads], ["engine-step", "E", "●", *threads]]


def test_a_release_is_added_to_the_variant_that_fits(declared: Path, release: Callable[..., Path]) -> None:
    path, known = declared / "engine-load.toml", fingerprint(ENGINE.format("", "7"), "Engine.load")
    before = path.read_text()
    variant = f"""
[[variant]]
target = "verl.workers.engine:Engine.load"
hook   = "fp16_patch.verl.fsdp.engine:other"

[variant.releases]
"0.8.0" = "{known}"

[[variant]]
target = "verl.workers.engine:Engine.other"
hook   = "fp16_patch.verl.fsdp.engine:other"

[variant.releases]
"0.7.0" = "x"
"""
    path.write_text(before + variant)
    release("0.8.1", load="7")
    matrix.add_release(Release("verl", "0.8.1"))
    assert path.read_text() == before + variant.replace(f'"{known}"\n', f'"{known}"\n"0.8.1" = "{known}"\n')
    release("0.9.2")
    matrix.add_release(Release("verl", "0.9.2"))
    assert (
        path.read_text()
        .partition("\n[[")[0]
        .endswith(f'"0.9.2" = "{fingerprint(ENGINE.format("", "1"), "Engine.load")}"\n')
    )


@pytest.mark.parametrize("path", sorted(declarations.patches_dir().glob("*/*.toml")), ids=lambda path: path.stem)
def test_every_declaration_can_be_added_to(path: Path) -> None:
    """`declare` finds a variant's table by its place among the headers of tables of releases."""
    patch, text = declarations.Patch.from_toml(path), path.read_text()
    assert text.count("[releases]\n") == 1
    assert text.count("[variant.releases]\n") == text.count("[[variant]]") == len(patch.variants) - 1
    assert text.index("[releases]\n") < (text + "[[variant]]").index("[[variant]]")


def exempt(declared: Path, releases: str, reason: str) -> None:
    path = declared / "engine-load.toml"
    path.write_text(path.read_text().replace("[releases]", f'[exempt]\n"{releases}" = {{ {reason} }}\n\n[releases]'))


@pytest.mark.parametrize(
    ("releases", "version", "status"),
    [
        ("==0.9.0", "0.9.0", Status.EXEMPT),
        (">=0.8,<0.9.1", "0.9.0rc1", Status.EXEMPT),
        ("==0.9.0", "0.9.2", Status.CHANGED),
        ("==0.9.1", "0.9.1", Status.APPLIES),  # code that is known is patched, whatever else is said
    ],
)
def test_a_release_may_do_without_a_patch(
    declared: Path, release: Callable[..., Path], releases: str, version: str, status: Status
) -> None:
    exempt(declared, releases, 'native = "it loads by itself"')
    release(version, load="1" if status is Status.APPLIES else "2")
    (verdicts,) = matrix.check_releases([Release("verl", version)])
    assert states(verdicts)["engine-load"] is status
    assert matrix.covered(verdicts) == (status is not Status.CHANGED)


@pytest.mark.parametrize(("releases", "status"), [("==0.9.0", Status.CHANGED), ("==0.9.1", Status.EXEMPT)])
def test_a_source_tree_does_without_what_the_release_it_is_like_does_without(
    declared: Path, release: Callable[..., Path], tmp_path: Path, releases: str, status: Status
) -> None:
    exempt(declared, releases, 'native = "it loads by itself"')
    shutil.unpack_archive(release("0.9.0", load="2"), tmp_path / "fork", "zip")
    # Its step is that of 0.9.1; the version in its metadata is not asked for.
    assert states(matrix.check_tree(tmp_path / "fork"))["engine-load"] is status


def test_what_is_said_of_a_release_goes_before_what_is_known_of_another(
    declared: Path, release: Callable[..., Path]
) -> None:
    exempt(declared, "==0.9.2", 'native = "what it calls is mended"')
    release("0.9.2")
    (verdicts,) = matrix.check_releases([Release("verl", "0.9.2")])
    assert states(verdicts)["engine-load"] is Status.EXEMPT


def test_the_matrix_says_why_a_release_does_without(declared: Path, release: Callable[..., Path]) -> None:
    exempt(declared, "==0.9.0", 'fixed_by = "engine-step"')
    release("0.9.0", load="2")
    matrix.add_release(Release("verl", "0.9.0"))
    shown = CliRunner().invoke(main, ["matrix"], env={"COLUMNS": "200"})
    (row,) = (line for line in shown.output.splitlines() if "engine-load" in line)
    assert row.split()[:3] == ["engine-load", "↑", "E"]


def test_releases_of_which_the_same_is_to_be_said_share_a_column(
    declared: Path, release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("0.9.0", "0.8.0"):
        release(version)
        matrix.add_release(Release("verl", version))
    monkeypatch.setattr(tables, "tested_levels", lambda: {Release("verl", "0.9.1"): "worker"})
    shown = CliRunner().invoke(main, ["matrix"], env={"COLUMNS": "200"})
    lines = [line.split() for line in shown.output.splitlines() if line.split()]
    assert lines[:4] == [
        ["verl,", "upstream", "verl-project/verl"],
        ["0.8.0", "–", "0.9.0"],
        ["│", "0.9.1"],
        ["patch", "│", "│", "upstream"],
    ]
    assert ["engine-step", "●", "W"] in [line[:3] for line in lines]


def test_the_matrix_is_read_in_80_columns() -> None:
    lines = CliRunner().invoke(main, ["matrix"], env={"COLUMNS": "80"}).output.splitlines()
    assert max(map(len, lines)) <= 80
    for patch in declarations.declared_patches():
        (row,) = [line for line in lines if line.split()[:1] == [patch.name]]
        known = [thread.partition("#")[2] for thread in patch.threads]
        assert [word.partition("#")[2].rstrip(",") for word in row.split() if "#" in word] == known
    releases = {release for patch in declarations.declared_patches() for release in patch.releases}
    headings = {word for line in lines[: lines.index("")] for word in line.replace("│", " ").split() if word[0] == "0"}
    assert {"0.8.0", "0.9.1.post1", "0.11.2"} <= headings <= releases


def test_a_check_is_read_in_80_columns(declared: Path, release: Callable[..., Path]) -> None:
    exempt(declared, "==0.9.2", 'native = "it loads by itself, and so there is nothing left to be done about it"')
    release("0.9.2", step="+ 1", load="2")
    shown = CliRunner().invoke(main, ["matrix", "--check", "verl==0.9.2"], env={"COLUMNS": "80"})
    assert max(map(len, shown.output.splitlines())) <= 80
    said = " ".join(shown.output.split())
    changed = fingerprint(ENGINE.format("+ 1", "2"), "Engine.step")
    assert "patch its code upstream" in said
    assert f"changed ({changed})" in said
    assert "verl.workers.engine:Engine.step" in said
    assert (
        "not needed, native: it loads by itself, and so there is nothing left to be done about it engine-load" in said
    )


def test_how_far_a_release_is_tested_is_read_from_what_drives_the_tests() -> None:
    assert matrix.tested_levels()[Release("verl", "0.9.1")] == "end to end"
    assert {release.package for release in matrix.tested_levels()} >= {"verl", "openrlhf"}


@pytest.mark.parametrize("reason", ['because = "x"', 'native = "x", refused = "y"'])
def test_an_exemption_has_one_known_reason(declared: Path, reason: str) -> None:
    exempt(declared, "==0.9.0", reason)
    with pytest.raises(ValueError):
        declarations.declared_patches()


def test_without_a_release_the_newest_is_meant(declared: Path, release: Callable[..., Path]) -> None:
    release("0.9.1")
    release("0.10.0", load="2")
    assert Release.parse("verl") == Release("verl", "0.10.0")


def test_a_patch_for_no_release_yet_is_shown_its_fingerprint(declared: Path, release: Callable[..., Path]) -> None:
    path = declared / "engine-load.toml"
    path.write_text(path.read_text().partition("[releases]")[0] + "[releases]\n")
    release("0.9.1")
    shown = CliRunner().invoke(main, ["matrix", "--add", "verl==0.9.1"], env={"COLUMNS": "200"})
    assert f"changed ({fingerprint(ENGINE.format('', '1'), 'Engine.load')})" in shown.output


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("verl==0.9.2", "0.9.2"),
        (" verl == 0.9.2 ", "0.9.2"),
        ("VERL==0.9.2", "0.9.2"),
        ("verl==v0.9.2", "0.9.2"),
        ("verl==0.9.2  # pinned", "0.9.2"),
        ("verl[vllm,gpu]==0.9.2", "0.9.2"),
        ("verl", "0.9.3"),
        ("verl # the newest", "0.9.3"),
    ],
)
def test_a_requirement_is_the_release_that_it_names(
    declared: Path, release: Callable[..., Path], text: str, version: str
) -> None:
    release("0.9.2")
    release("0.9.3")
    assert Release.parse(text) == Release("verl", version)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("verl @ file:///srv/our_verl", "a URL names no release"),
        ("verl @ https://example.com/verl-0.9.2-py3-none-any.whl", "a URL names no release"),
        ("verl[vllm] @ git+https://example.com/verl.git@main", "a URL names no release"),
        ("verl@file:///srv/our_verl", "a URL names no release"),
        ("verl==0.9.2; python_version < '3'", "behind the `;` it says where it holds"),
        ("verl; sys_platform == 'win32'", "behind the `;` it says where it holds"),
        ("verl>=0.9", "not one release"),
        ("verl==0.9.*", "not one release"),
        ("verl===0.9.2", "not one release"),
        ("verl==0.9.2,!=0.9.3", "not one release"),
        ("torch==2.9.0", "not one release of a patched package"),
        ("-r other.txt", "not a requirement: -r is an option of pip"),
        ("-e .", "not a requirement: -e is an option of pip"),
        ("verl==0.9.2 --hash=sha256:00", "not a requirement: --hash is an option of pip"),
        ("./our_verl", "not a requirement"),
        ("file:///srv/our_verl", "not a requirement"),
        ("# verl==0.9.2", "not a requirement"),
        ("", "not a requirement"),
    ],
)
def test_what_is_no_release_is_refused_by_name_and_not_judged(
    declared: Path, release: Callable[..., Path], text: str, why: str
) -> None:
    release("0.9.2")
    for option in ("--check", "--add"):
        ended = CliRunner().invoke(main, ["matrix", option, "verl==0.9.2", option, text])
        assert ended.exit_code == 1
        assert ended.output.startswith(f"Error: {text}: ") or not text
        assert why in ended.output
        assert "Fix: give one release of" in ended.output


def test_a_wheel_that_is_none_is_named(declared: Path, release: Callable[..., Path]) -> None:
    wheel = release("0.9.2")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("verl/workers/engine.py", "def step(:\n")
    with pytest.raises(SourceError, match=r"verl/workers/engine.py: not read as Python: invalid syntax"):
        matrix.check_releases([Release("verl", "0.9.2")])
    wheel.write_bytes(b"no zip")
    with pytest.raises(SourceError, match=r"verl==0.9.2: pip cannot download|verl-0.9.2.*: no wheel"):
        matrix.check_releases([Release("verl", "0.9.2")])
