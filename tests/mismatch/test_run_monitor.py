"""The plan's say in the monitor: what the ranks are told, when an alert fires, and what one does."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("ray")

from fp16_patch.mismatch import run_monitor
from fp16_patch.mismatch.run_monitor import RunMonitor
from fp16_patch.plan.errors import MismatchAlert
from fp16_patch.plan.plan import Plan


class Monitor:
    """Has measured the same gap each step."""

    def __init__(self, out_dir: Path, run: str | None, timeout_s: float, sinks: Any, annotate: Any) -> None:
        self.run, self.round, self.timeout_s, self.sinks, self.annotate = run or "new", 0, timeout_s, sinks, annotate
        self.lines: list[Any] = []
        self.expected: list[int] = []
        self.flushed = 0

    def expect(self, tokens: int) -> None:
        self.expected.append(tokens)

    def end_step(self, step: int, metrics: dict[str, Any]) -> None:
        self.lines.append(self.annotate(step, metrics))
        self.round += 1

    def pass_step(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def write(self, name: str, document: dict[str, Any]) -> None:
        pass

    def flush(self) -> None:
        self.flushed += 1


@pytest.fixture(autouse=True)
def _monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_monitor, "Monitor", Monitor)


WIDE = {"mismatch/k1": 0.4}


def test_an_alert_is_logged_once_and_stands_on_every_line(caplog: pytest.LogCaptureFixture) -> None:
    monitor = RunMonitor(Plan(alert_after=2), Path("unused"))
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        for step in range(1, 5):
            monitor.end_step(step, dict(WIDE))
    lines = monitor._monitor.lines
    assert [bool(line["alerts"]) for line in lines] == [False, True, True, True]
    assert lines[-1]["alerts"] == [{"name": "k1", "value": 0.4, "threshold": 0.1, "since": 1}]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "k1" in said
    assert "0.4" in said
    assert "since step 1" in said


def test_on_alert_stop_ends_the_run_after_the_record_is_safe() -> None:
    monitor = RunMonitor(Plan(on_alert="stop", alert_after=1), Path("unused"))
    with pytest.raises(MismatchAlert, match=r"(?s)training stopped at step 3.*k1.*on_alert=log") as stopped:
        monitor.end_step(3, dict(WIDE))
    assert monitor._monitor.flushed == 1
    assert stopped.value.step == 3


@pytest.mark.parametrize(
    ("missing", "certain", "stops"), [(19, 19, False), (19, 18, True), (1, 0, True), (0, 0, False)]
)
def test_certain_tokens_without_a_log_prob_do_not_end_a_run(missing: int, certain: int, stops: bool) -> None:
    monitor = RunMonitor(Plan(on_alert="stop"), Path("unused"))
    metrics = {"mismatch/nonfinite_tokens": float(missing), "mismatch/nonfinite_certain": float(certain)}
    with pytest.raises(MismatchAlert, match="nonfinite") if stops else nullcontext():
        monitor.end_step(1, dict(metrics))


@pytest.mark.parametrize("side", ["sampler", "learner"])
def test_what_is_no_log_prob_ends_a_run(side: str) -> None:
    monitor = RunMonitor(Plan(on_alert="stop"), Path("unused"))
    with pytest.raises(MismatchAlert, match=f"positive_{side}: mismatch/positive_{side} is 7, and may only be 0"):
        monitor.end_step(1, {f"mismatch/positive_{side}": 7.0})


def test_a_threshold_of_the_plan_is_the_threshold() -> None:
    monitor = RunMonitor(Plan(on_alert="stop", alert_after=1, alert_k1=0.5), Path("unused"))
    monitor.end_step(1, dict(WIDE))
    assert monitor._monitor.lines == [{"alerts": []}]


def test_ranks_are_told_run_round_and_when_the_floor_is_due() -> None:
    monitor = RunMonitor(Plan(noise_floor_every=2), Path("unused"), "run")
    orders = []
    for step in range(4):
        orders.append(monitor.order)
        monitor.end_step(step, {})
    assert orders == [("run", 0, True), ("run", 1, False), ("run", 2, True), ("run", 3, False)]
    assert RunMonitor(Plan(noise_floor_every=0), Path("unused")).order[2] is False


def test_expected_tokens_add_up_within_a_step() -> None:
    monitor = RunMonitor(Plan(), Path("unused"))
    monitor.expect(5)
    monitor.expect(7)
    monitor.end_step(1, {})
    monitor.expect(3)
    assert monitor._monitor.expected == [5, 12, 3]


def test_without_the_monitor_nobody_is_told_to_observe() -> None:
    assert RunMonitor(Plan(), Path("unused")).measures
    assert not RunMonitor(Plan(monitor=False), Path("unused")).measures
