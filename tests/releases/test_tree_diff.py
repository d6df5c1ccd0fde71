"""Diffs for small source trees, from declarations made here; and what the real declarations owe."""

from __future__ import annotations

import ast
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from packaging.version import Version

from fp16_patch import Plan
from fp16_patch.cli import main
from fp16_patch.patching import declarations
from fp16_patch.patching.declarations import Patch, Variant, declared_patches
from fp16_patch.patching.fingerprint import fingerprint
from fp16_patch.releases import tree_diff
from fp16_patch.releases.source_patch import filled_in
from fp16_patch.releases.tree_diff import Done

ENGINE = "class Engine:\n    def build(self):\n        return torch.bfloat16\n\n    def step(self):\n        return 1\n"
OTHER = "def scale(x):\n    return x\n"
MODULES = {"verl/engine.py": ENGINE, "verl/numerics.py": OTHER}
TOML = """target   = "verl.{target}"
{how}
why      = "Because."
upstream = "not reported"
retire   = "never"
{more}
[releases]
"0.9.1" = "{fingerprint}"
"""
HOOK = 'hook = "fp16_patch.verl.fsdp.engine:hook"'
LONGEST = 10
"""Lines that a fork's owner reads at one go."""

Declare = Callable[..., None]


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Declare:
    """Declares a patch of verl 0.9.1 with a function of `MODULES` for its target."""
    folder = tmp_path / "checkout" / "patches" / "verl"
    folder.mkdir(parents=True)
    for module in (declarations, tree_diff):
        monkeypatch.setattr(module, "patches_dir", lambda: folder.parent)

    def declare(name: str, target: str, more: str = "", how: str = HOOK, known: str | None = None) -> None:
        module, _, qualname = target.partition(":")
        known = known or fingerprint(MODULES[f"verl/{module}.py"], qualname)
        (folder / f"{name}.toml").write_text(TOML.format(target=target, how=how, more=more, fingerprint=known))

    return declare


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        path = tmp_path / "fork" / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "fork"


def diff(tree: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["diff", "--source", str(tree), *options], env={"COLUMNS": "200"})


def patched(tree: Path, text: str) -> dict[str, str]:
    subprocess.run(["patch", "-p1"], cwd=tree, input=text.encode(), check=True, capture_output=True)
    return {name: (tree / "src" / name).read_text() for name in MODULES}


def test_a_tree_is_edited_by_what_is_written_and_what_is_done_at_run_time(declare: Declare, tree: Path) -> None:
    declare("build", "engine:Engine.build", how='edit = ["torch.bfloat16"]')
    declare("step", "engine:Engine.step", '[diff]\nbefore = "self.scale = {init_scale}"')
    declare("scale", "numerics:scale", "[diff]\nreplace = { x = 'x.to(\"{mode}\")' }")
    result = diff(tree, "--dtype", "float16")
    assert result.exit_code == 0
    assert {name: text.splitlines() for name, text in patched(tree, result.stdout).items()} == {
        "verl/engine.py": [
            "class Engine:",
            "    def build(self):",
            "        return torch.float16",
            "",
            "    def step(self):",
            "        self.scale = 65536.0",
            "        return 1",
        ],
        "verl/numerics.py": ["def scale(x):", '    return x.to("fp16")'],
    }


def test_the_tree_itself_is_left_alone_and_the_diff_goes_where_it_is_told(
    declare: Declare, tree: Path, tmp_path: Path
) -> None:
    declare("build", "engine:Engine.build", how='edit = ["torch.bfloat16"]')
    result = diff(tree, "--output", str(tmp_path / "our.diff"))
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tree / "src/verl/engine.py").read_text() == ENGINE
    assert "+        return torch.float16" in (tmp_path / "our.diff").read_text()


def test_no_diff_lands_in_our_own_checkout(declare: Declare, tree: Path, tmp_path: Path) -> None:
    declare("build", "engine:Engine.build", how='edit = ["torch.bfloat16"]')
    place = tmp_path / "checkout" / "our.diff"
    result = diff(tree, "--output", str(place))
    assert result.exit_code == 1
    assert "Fix: write it outside" in result.stderr
    assert not place.exists()


def test_each_patch_says_what_becomes_of_it(declare: Declare, tree: Path) -> None:
    exempt = '[exempt]\n"==0.9.1" = { native = "it is right" }\n'
    declare("edited", "engine:Engine.build", '[diff]\nedit = ["torch.bfloat16"]\nlost = "the warning"')
    declare("watching", "engine:Engine.step", "observes = true")
    declare("long", "engine:Engine.step", '[diff]\nno = "it takes a page"')
    declare("nobody", "engine:Engine.step")
    declare("misses", "engine:Engine.step", '[diff]\nedit = ["torch.bfloat16"]')
    declare("other", "numerics:scale", known="0" * 16)
    declare("right", "numerics:scale", exempt, known="1" * 16)
    _, outcomes = tree_diff.diff_of(tree, Plan())
    said = {outcome.verdict.patch.name: (outcome.done, outcome.text) for outcome in outcomes}
    assert said == {
        "edited": (Done.EDITED, "but not: the warning"),
        "watching": (Done.LOADED, "watches or checks a run. Because."),
        "long": (Done.LOADED, "it takes a page"),
        "nobody": (Done.UNWRITTEN, "Because."),
        "misses": (Done.UNWRITTEN, "step: torch.bfloat16 does not occur. Because."),
        "other": (Done.UNKNOWN, "changed. Because."),
        "right": (Done.NEEDLESS, "native: it is right"),
    }
    result = diff(tree)
    assert result.exit_code == 1
    assert "of 7 patches, 1 edited, 1 code that no patch knows, 2 no edit known" in result.stderr


def test_what_is_edited_already_is_not_edited_again(declare: Declare, tree: Path) -> None:
    declare("step", "engine:Engine.step", '[diff]\nbefore = "pass"')
    declare("scale", "numerics:scale", "observes = true")
    patched(tree, diff(tree).stdout)
    again = diff(tree)
    assert (again.exit_code, again.stdout) == (1, "")


def test_settings_of_the_environment_are_written_in(
    declare: Declare, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare("step", "engine:Engine.step", '[diff]\nbefore = "self.scale = {init_scale}, torch.{dtype}"')
    monkeypatch.setenv("FP16_PATCH_INIT_SCALE", "1024")
    assert "self.scale = 1024.0, torch.bfloat16" in diff(tree, "--dtype", "bfloat16").stdout


def test_openrlhf_has_no_float32(tmp_path: Path) -> None:
    module = tmp_path / "openrlhf/utils/deepspeed/deepspeed.py"
    module.parent.mkdir(parents=True)
    module.write_text("class DeepspeedStrategy:\n    def __init__(self):\n        pass\n")
    result = diff(tmp_path, "--dtype", "float32")
    assert result.exit_code == 1
    assert "OpenRLHF trains in bf16 or fp16 only" in result.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252"])
def test_a_diff_is_in_the_encoding_of_the_file(declare: Declare, tree: Path, tmp_path: Path, encoding: str) -> None:
    declared = "" if encoding.startswith("utf") else f"# coding: {encoding}\n"
    before = f"{declared}# größer\n{ENGINE}# später\n".encode(encoding)
    (tree / "src" / "verl" / "engine.py").write_bytes(before)
    declare("build", "engine:Engine.build", how='edit = ["torch.bfloat16"]')
    diff(tree, "--output", str(tmp_path / "made.diff"))
    subprocess.run(["patch", "-p1", "-s", "-d", str(tree), "-i", str(tmp_path / "made.diff")], check=True)
    after = (tree / "src" / "verl" / "engine.py").read_bytes()
    assert after == before.replace(b"torch.bfloat16", b"torch.float16")


@pytest.mark.parametrize("arguments", [("doctor", "--source"), ("diff", "--source")], ids=" ".join)
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"def build(:\n", "invalid syntax"),
        (b"x = 1\0\n", "null byte"),
        (ENGINE.encode("utf-16"), "encoding declaration"),
    ],
)
def test_a_file_that_is_no_python_is_one_sentence(
    declare: Declare, tree: Path, arguments: tuple[str, ...], content: bytes, why: str
) -> None:
    declare("build", "engine:Engine.build", how='edit = ["torch.bfloat16"]')
    (tree / "src" / "verl" / "engine.py").write_bytes(content)
    ended = CliRunner().invoke(main, [*arguments, str(tree)])
    assert ended.exit_code == 1
    assert ended.output.startswith(f"Error: {tree / 'src' / 'verl' / 'engine.py'}: not read as Python: ")
    assert why in ended.output
    assert ended.output.count("\n") == 1


def newest(package: str) -> str:
    releases = [release for patch in declared_patches() if patch.package == package for release in patch.releases]
    return max(releases, key=Version)


@pytest.mark.parametrize("patch", declared_patches(), ids=lambda patch: patch.name)
def test_what_changes_the_newest_release_has_an_edit_or_a_reason(patch: Patch) -> None:
    variants = [variant for variant in patch.variants if newest(patch.package) in variant.releases]
    assert patch.observes or all(variant.by_edit for variant in variants)


WRITTEN = [variant for patch in declared_patches() for variant in patch.variants if variant.diff]


@pytest.mark.parametrize("variant", WRITTEN, ids=lambda variant: variant.target.rpartition(":")[2])
def test_a_declared_edit_is_python_and_short(variant: Variant) -> None:
    assert variant.diff is not None
    for text in (variant.diff.before, variant.diff.after):
        body = textwrap.indent(filled_in(text.strip("\n"), Plan()), "    ")
        ast.parse(f"def f():\n    pass\n{body}\n")
        assert len(body.split("\n")) <= LONGEST
    for old, new in variant.diff.replace.items():
        ast.parse(old, mode="eval")
        ast.parse(new, mode="eval")
