"""Texts of tokens come from tokenizers that transformers has; a record may name any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from fp16_patch.mismatch.report.decoding import TokenizerError, tokenizer_of
from tests.foreign_code import make_foreign_model


def test_code_of_a_folder_is_not_run_whatever_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    was_run = make_foreign_model(tmp_path / "model")
    with pytest.raises(TokenizerError, match="no tokenizer in"):
        tokenizer_of(tmp_path / "model")
    assert not was_run.exists()
