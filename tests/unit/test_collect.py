"""The monitor's end in the driver: whatever happens to it, the caller goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ray = pytest.importorskip("ray")

from fp16_patch.mismatch import collect
from fp16_patch.mismatch.collect import MAX_PENDING, Monitor, Recorder
from fp16_patch.mismatch.stats import MismatchStats


class SlowRecorder:
    """A recorder none of whose calls has ended yet."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        for method in ("append", "write"):
            setattr(self, method, SimpleNamespace(remote=lambda *a, m=method: self.calls.append((m, *a))))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowRecorder:
    recorder = SlowRecorder()
    monkeypatch.setattr(collect, "_start_recorder", lambda out_dir: recorder)
    monkeypatch.setattr(ray, "wait", lambda pending, **_: ([], pending))
    return recorder


def log_probs() -> tuple[Any, Any, Any]:
    sampler = torch.full((2, 3), -1.0)
    return sampler, sampler + 0.5, torch.ones(2, 3)


def test_a_step_is_in_the_metrics_and_on_record(slow: SlowRecorder) -> None:
    monitor, metrics = Monitor(Path("unused")), {"actor/grad_norm": 1.5, "text": "kept out of the record"}
    monitor.observe(*log_probs())
    monitor.observe(*log_probs())
    monitor.end_step(7, metrics)
    assert metrics["mismatch/tokens"] == 12
    assert metrics["mismatch/mean_abs"] == pytest.approx(0.5)
    (_, _, mismatch), (_, _, step) = slow.calls
    assert MismatchStats.from_dict(mismatch["state"]).metrics()["mismatch/tokens"] == 12
    assert (step["step"], step["metrics"]["actor/grad_norm"]) == (7, 1.5)
    assert "text" not in step["metrics"]


def test_each_step_starts_anew(slow: SlowRecorder) -> None:
    monitor, first, second = Monitor(Path("unused")), {}, {}
    monitor.observe(*log_probs())
    monitor.end_step(1, first)
    monitor.end_step(2, second)
    assert "mismatch/tokens" in first
    assert "mismatch/tokens" not in second


def test_what_a_slow_recorder_cannot_take_is_dropped_and_counted(slow: SlowRecorder) -> None:
    monitor = Monitor(Path("unused"))
    for step in range(MAX_PENDING + 5):
        monitor.end_step(step, {})
    metrics: dict[str, Any] = {}
    monitor.end_step(0, metrics)
    assert len(slow.calls) == MAX_PENDING
    assert metrics["mismatch/records_dropped"] == 5


def test_a_monitor_that_fails_warns_once_and_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(out_dir: Path) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(collect, "_start_recorder", broken)
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        monitor = Monitor(Path("unused"))
        monitor.observe(torch.zeros(1, 2), torch.zeros(3, 4), torch.ones(1, 2))
        monitor.end_step(1, {})
        monitor.flush()
    assert [record.getMessage() for record in caplog.records] == [
        "the mismatch monitor failed, training goes on without it: no space left on device"
    ]


def test_the_recorder_appends_lines_and_replaces_documents(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path / "new"))
    recorder.append("steps.jsonl", {"step": 1})
    recorder.append("steps.jsonl", {"step": 2})
    recorder.write("ledger.json", {"roles": {}})
    recorder.write("ledger.json", {"roles": {"actor": {}}})
    lines = (tmp_path / "new" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2}]
    assert json.loads((tmp_path / "new" / "ledger.json").read_text()) == {"roles": {"actor": {}}}
    assert not list(tmp_path.rglob("*.partial"))
