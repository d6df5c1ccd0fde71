"""The house: few modules lie flat, every room says what it is for, and the arrows between rooms run one way.

The arrows themselves are contracts in pyproject.toml, which `make lint` checks; here is what import-linter cannot say.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fp16_patch

HOUSE = Path(fp16_patch.__file__).parent
FRAMEWORKS = ("verl", "openrlhf")
STATISTICS = sorted((HOUSE / "mismatch" / "statistics").glob("*.py"))
# `startup` is no package: Python imports its `sitecustomize` by that name.
ROOMS = sorted(path for path in HOUSE.rglob("*") if path.is_dir() and any(path.glob("*.py")) and path.name != "startup")
MOST_FLAT_MODULES = 8


def named(path: Path) -> str:
    return path.relative_to(HOUSE.parent).as_posix()


def imported(path: Path) -> Iterator[str]:
    """What a module imports, at the top or inside a function; the second part of `from a import b` may be a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_few_modules_lie_flat() -> None:
    assert len([*HOUSE.glob("*.py")]) <= MOST_FLAT_MODULES


@pytest.mark.parametrize("room", ROOMS, ids=named)
def test_every_room_says_what_it_is_for(room: Path) -> None:
    module = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(module)


@pytest.mark.parametrize("module", STATISTICS, ids=named)
def test_statistics_know_torch_and_their_own_room_alone(module: Path) -> None:
    def allowed(name: str) -> bool:
        top = name.partition(".")[0]
        ours = name.startswith("fp16_patch.mismatch.statistics.")
        return ours or top == "torch" or top in sys.stdlib_module_names

    assert [name for name in imported(module) if not allowed(name)] == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_framework_imports_another(framework: str) -> None:
    # Neither our folder for it, nor the framework itself.
    others = [name for name in FRAMEWORKS if name != framework]
    foreign = [f"{prefix}{name}." for name in others for prefix in ("", "fp16_patch.")]
    crossing = [
        (named(path), name)
        for path in (HOUSE / framework).rglob("*.py")
        for name in imported(path)
        if f"{name}.".startswith(tuple(foreign))
    ]
    assert crossing == []


def test_the_core_imports_no_framework() -> None:
    reached = [
        (named(path), name)
        for path in HOUSE.rglob("*.py")
        if path.relative_to(HOUSE).parts[0] not in FRAMEWORKS
        for name in imported(path)
        if name.partition(".")[0] in FRAMEWORKS
    ]
    assert reached == []
