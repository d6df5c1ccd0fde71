"""Callbacks and refusals at imports: each once, in any order, and gone when they are taken back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from wrapt import importer

from fp16_patch.patching import import_hooks
from fp16_patch.patching.import_hooks import refuse_import, when_imported

NAME = "imported_in_a_test"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / f"{NAME}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield NAME
    sys.modules.pop(NAME, None)
    importer._post_import_hooks.pop(NAME, None)
    import_hooks._registered.discard(NAME)


def test_a_callback_is_made_now_or_later_and_once() -> None:
    called: list[ModuleType] = []
    when_imported(NAME, called.append)
    assert called == []
    imported = importlib.import_module(NAME)
    assert called == [imported]
    when_imported(NAME, called.append)
    assert called == [imported, imported]
    # Another module of that name, for one after the first was thrown out, has its own.
    del sys.modules[NAME]
    when_imported(NAME, called.append)
    assert called[2:] == []
    assert importlib.import_module(NAME) is called[2]


def test_what_is_taken_back_is_not_called_and_leaves_nothing() -> None:
    called: list[ModuleType] = []
    before = len(importer._post_import_hooks.get(NAME, ()))
    for _ in range(5):
        when_imported(NAME, called.append)()
    assert len(importer._post_import_hooks[NAME]) == before + 1
    assert NAME not in import_hooks._waiting
    kept = when_imported(NAME, called.append)
    importlib.import_module(NAME)
    assert len(called) == 1
    kept()


def test_a_refused_module_is_refused_each_time_until_that_is_taken_back() -> None:
    finders = list(sys.meta_path)
    allow = refuse_import([NAME], lambda name: RuntimeError(f"{name} is refused"))
    also = refuse_import([NAME, "another"], lambda name: RuntimeError(f"{name} is refused as well"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{NAME} is refused$"):
            importlib.import_module(NAME)
    allow()
    with pytest.raises(RuntimeError, match="as well"):
        importlib.import_module(NAME)
    also()
    also()
    importlib.import_module(NAME)
    assert sys.meta_path == finders
