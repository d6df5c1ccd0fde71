"""A module is read as Python reads it, or refused in a sentence that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fp16_patch.patching.fingerprint import fingerprint
from fp16_patch.patching.sources import MAX_SOURCE_BYTES, Installed, Tree
from fp16_patch.plan.errors import SourceError

TEXT = 'def step():\n    return "größer"\n'
ENCODED = {
    "UTF-8": TEXT.encode(),
    "byte order mark": TEXT.encode("utf-8-sig"),
    "Latin-1": b"# -*- coding: latin-1 -*-\n" + TEXT.encode("latin-1"),
    "declared in the second line": b"#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\n" + TEXT.encode("cp1252"),
    "Windows' line ends": TEXT.replace("\n", "\r\n").encode(),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    return tmp_path


@pytest.mark.parametrize("content", ENCODED.values(), ids=ENCODED)
@pytest.mark.parametrize("installed", [False, True], ids=["tree", "installed"])
def test_legal_python_is_read_as_python_reads_it(
    tree: Path, content: bytes, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tree)
    (tree / "pack" / "module.py").write_bytes(content)
    compile(content, "module.py", "exec")
    read = (Installed() if installed else Tree(tree)).read("pack.module")
    assert read is not None
    assert fingerprint(read, "step") == fingerprint(TEXT, "step")


def nested(depth: int) -> bytes:
    return b"x = " + b"-" * depth + b"1\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"def step(:\n", "invalid syntax"),
        (b"x = 1\0\n", "null byte"),
        (TEXT.encode("utf-16"), "invalid or missing encoding declaration"),
        (TEXT.encode("utf-32"), "invalid or missing encoding declaration"),
        (b"# coding: no-such\n", "unknown encoding"),
        (TEXT.encode("latin-1"), "codec can't decode"),
        (b"x = " + b"(" * 1000 + b")" * 1000, "too many nested parentheses"),
        (nested(100_000), "nested too deeply"),
    ],
)
def test_what_is_no_python_is_named_with_the_reason(tree: Path, content: bytes, why: str) -> None:
    (tree / "pack" / "module.py").write_bytes(content)
    with pytest.raises(SourceError, match=why) as refused:
        Tree(tree).read("pack.module")
    assert str(refused.value).startswith(f"{tree / 'pack' / 'module.py'}: ")


def test_a_module_is_not_read_without_bound(tree: Path) -> None:
    with (tree / "pack" / "module.py").open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(SourceError, match=f"larger than {MAX_SOURCE_BYTES} bytes"):
        Tree(tree).read("pack.module")


def test_links_in_a_circle_are_named(tree: Path) -> None:
    (tree / "pack" / "module.py").symlink_to("module.py")
    with pytest.raises(SourceError, match=r"module\.py: too many levels of symbolic links"):
        Tree(tree).read("pack.module")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tree: Path) -> None:
    (tree / "pack" / "module.py").touch(mode=0)
    with pytest.raises(SourceError, match=r"module\.py: permission denied"):
        Tree(tree).read("pack.module")


def test_folders_and_pipes_are_no_modules_as_for_python(tree: Path) -> None:
    (tree / "pack" / "module.py").mkdir()
    os.mkfifo(tree / "pack" / "other.py")
    assert Tree(tree).read("pack.module") is None
    assert Tree(tree).read("pack.other") is None
    assert Tree(tree).read("pack.module.inside") is None
