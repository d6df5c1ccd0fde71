"""The record on disk, whatever happens to the disk."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from fp16_patch.mismatch.collection import writer as writer_module
from fp16_patch.mismatch.collection.writer import MAX_WAITING, Writer


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_and_documents_replaced(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "new")
    writer.append("steps.jsonl", {"step": 1})
    writer.append("steps.jsonl", {"step": 2})
    writer.write("ledger.json", {"roles": {}})
    writer.write("ledger.json", {"roles": {"actor": {}}})
    assert writer.flush(10.0)
    assert lines_of(tmp_path / "new" / "steps.jsonl") == [{"step": 1}, {"step": 2}]
    assert json.loads((tmp_path / "new" / "ledger.json").read_text()) == {"roles": {"actor": {}}}
    assert not list(tmp_path.rglob("*.partial"))


def test_a_line_that_a_killed_writer_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2, "ti')
    writer = Writer(tmp_path)
    writer.append("steps.jsonl", {"step": 3})
    writer.append("steps.jsonl", {"step": 4})
    assert writer.flush(10.0)
    assert (tmp_path / "steps.jsonl").read_text().splitlines() == [
        '{"step": 1}',
        '{"step": 2, "ti',
        '{"step": 3}',
        '{"step": 4}',
    ]


def test_a_full_disk_is_one_warning_and_later_lines_are_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "steps.jsonl"
    log.symlink_to("/dev/full")
    writer = Writer(tmp_path)
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        writer.append("steps.jsonl", {"step": 1})
        writer.append("steps.jsonl", {"step": 2})
        assert writer.flush(10.0)
    log.unlink()
    writer.append("steps.jsonl", {"step": 3})
    assert writer.flush(10.0)
    assert (lines_of(log), writer.dropped) == ([{"step": 3}], 2)
    assert [record.getMessage() for record in caplog.records] == [
        f"the record in {tmp_path} is incomplete, training goes on: [Errno 28] No space left on device"
    ]


def test_a_disk_that_hangs_costs_lines_but_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hung, release = threading.Event(), threading.Event()
    written: list[int] = []

    def hang(path: Path, record: dict[str, Any]) -> None:
        hung.set()
        release.wait()
        written.append(record["step"])

    monkeypatch.setattr(writer_module, "_append", hang)
    writer = Writer(tmp_path)
    writer.append("steps.jsonl", {"step": 0})
    hung.wait()
    for step in range(1, MAX_WAITING + 6):
        writer.append("steps.jsonl", {"step": step})
    assert not writer.flush(0.01)
    assert writer.dropped == 5
    release.set()
    assert writer.flush(10.0)
    assert written == list(range(MAX_WAITING + 1))
