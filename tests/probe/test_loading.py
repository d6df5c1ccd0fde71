"""What the probe loads, and what it refuses to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp16_patch.plan.errors import PlanError
from fp16_patch.probe.loading import load_config_and_tokenizer, load_model
from tests.foreign_code import make_foreign_model


@pytest.mark.parametrize(
    "load", [load_config_and_tokenizer, lambda path: load_model(path, "cpu")], ids=["configuration", "model"]
)
def test_code_of_a_folder_is_not_run_whatever_is_answered(
    load: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    was_run = make_foreign_model(tmp_path / "model")
    with pytest.raises(PlanError, match="Fix: give a causal language model that transformers loads by itself"):
        load(tmp_path / "model")
    assert not was_run.exists()
