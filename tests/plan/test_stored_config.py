"""What is read of a stored model's configuration, whatever lies there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fp16_patch.plan.stored_config import MAX_BYTES, parts_of, quantization_of, stored_config, stored_dtype


@pytest.mark.parametrize("text", ["not json", "[]", "[" * 100_000, None], ids=["no JSON", "a list", "nested", "absent"])
def test_what_is_no_configuration_is_the_frameworks_to_complain_about(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert stored_config(tmp_path) == {}


def test_a_configuration_is_read_within_bounds(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"dtype": "float16"}))
    assert stored_dtype(tmp_path) == "float16"
    with file.open("r+b") as sparse:
        sparse.truncate(MAX_BYTES + 1)
    assert stored_config(tmp_path) == {}
    file.unlink()
    os.mkfifo(file)
    assert stored_config(tmp_path) == {}


@pytest.mark.parametrize(
    "model", ["m" * 5000, f"owner/{'m' * 5000}", "bad\0name", "owner/bad\0name", "~nobody-of-this-name", "/dev/zero"]
)
def test_a_model_that_can_lie_nowhere_has_no_configuration(model: str) -> None:
    assert stored_config(model) == {}


def test_a_cache_that_names_no_snapshot_has_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    for head in (b"\xff\xfe", b"a\0b", b"x" * 5000, b"none"):
        (refs / "main").write_bytes(head)
        assert stored_config("owner/name") == {}
    monkeypatch.setenv("HF_HUB_CACHE", "~nobody-of-this-name/hub")
    assert stored_config("owner/name") == {}


def test_parts_are_found_however_deep_in_the_order_of_the_configuration() -> None:
    nested: dict[str, object] = {"dtype": "float16"}
    for _ in range(5000):
        nested = {"text_config": nested}
    assert sum(1 for _ in parts_of(nested)) == 5001
    stored = {"a_config": {"id": 1, "b_config": {"id": 2}}, "c_config": {"id": 3}, "d": {"id": 4}, "e_config": [5]}
    assert [part.get("id") for part in parts_of(stored)] == [None, 1, 2, 3]


@pytest.mark.parametrize("value", [{}, [], 5, "text", True, None, {"quant_method": ["a"]}])
def test_values_of_other_types_are_told_as_they_are(value: object) -> None:
    quantization_of({"quantization_config": value, "text_config": value, "dtype": value})
