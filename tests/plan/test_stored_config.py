"""What is read of a stored model's configuration, whatever lies there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp16_patch.plan.stored_config import stored_config


@pytest.mark.parametrize("text", ["not json", "[]", "[" * 100_000, None], ids=["no JSON", "a list", "nested", "absent"])
def test_what_is_no_configuration_is_the_frameworks_to_complain_about(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert stored_config(tmp_path) == {}
