"""The monitor's end in the driver: whatever happens to it, the caller goes on, and soon."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ray = pytest.importorskip("ray")

from fp16_patch.mismatch.collection import actors
from fp16_patch.mismatch.collection.monitor import MAX_PENDING, ROOT_SHARE, Monitor
from fp16_patch.mismatch.collection.patience import IMPATIENT_S
from fp16_patch.mismatch.collection.root import Root
from fp16_patch.mismatch.record.reading import MISMATCH, STEPS
from fp16_patch.mismatch.statistics.summary import MismatchStats
from tests.mismatch.measured import measured

ROOT_OF = "fp16_patch.mismatch.collection.monitor.root_of"
DIED = ray.exceptions.ActorDiedError()


@dataclass(eq=False)
class Call:
    result: Any = None
    ended: bool = True


class Handle:
    """The handle of a root that is in this process, and of one that hangs or is dead."""

    def __init__(self, root: Root) -> None:
        self.root, self.hangs, self.dead = root, False, False
        self.calls: list[str] = []
        self.waits: list[float] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(method, arguments))

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Call:
        self.calls.append(method)
        if method == "gather":
            self.waits.append(arguments[-1])
        if self.hangs:
            return Call(ended=False)
        if self.dead:
            return Call(DIED)
        result = getattr(self.root, method)(*arguments)
        return Call(asyncio.run(result) if inspect.iscoroutine(result) else result)


class FakeRay:
    """Records how long was waited, without waiting."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    def wait(self, calls: list[Call], num_returns: int = 1, timeout: float = 0) -> tuple[list[Call], list[Call]]:
        if timeout:
            self.waited.append(timeout)
        return [call for call in calls if call.ended], [call for call in calls if not call.ended]

    def get(self, call: Call) -> Any:
        if isinstance(call.result, Exception):
            raise call.result
        return call.result


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray, "wait", fake.wait)
    monkeypatch.setattr(ray, "get", fake.get)
    return fake


@pytest.fixture
def root(clock: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Handle:
    handle = Handle(Root("run", str(tmp_path)))
    monkeypatch.setattr(ROOT_OF, lambda run, out_dir, sinks: handle)
    monkeypatch.setattr(actors, "aggregators_of", lambda run, known: {})
    monkeypatch.setattr(actors, "new_run", lambda: "run")
    return handle


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_probs() -> tuple[Any, Any, Any]:
    sampler = torch.full((2, 3), -1.0)
    return sampler, sampler + 0.5, torch.ones(2, 3)


def test_a_step_is_in_the_metrics_and_on_record(root: Handle, tmp_path: Path) -> None:
    monitor, metrics = Monitor(tmp_path), {"actor/grad_norm": 1.5, "text": "kept out of the record"}
    monitor.observe(*log_probs())
    monitor.observe(*log_probs())
    stats = monitor.end_step(7, metrics, {"alerts": []})
    monitor.flush()
    assert stats is not None
    assert stats.tokens == metrics["mismatch/tokens"] == 12
    assert metrics["mismatch/mean_abs"] == pytest.approx(0.5)
    (mismatch,), (step,) = lines_of(tmp_path / MISMATCH), lines_of(tmp_path / STEPS)
    assert MismatchStats.from_dict(mismatch["state"]).tokens == 12
    assert (mismatch["step"], mismatch["alerts"], mismatch["attempt"]) == (7, [], monitor.attempt)
    assert (step["step"], step["metrics"]["actor/grad_norm"], step["attempt"]) == (7, 1.5, monitor.attempt)
    assert "text" not in step["metrics"]


def test_each_step_starts_anew(root: Handle, tmp_path: Path) -> None:
    monitor, first, second = Monitor(tmp_path), {}, {}
    monitor.observe(*log_probs())
    monitor.end_step(1, first)
    assert monitor.end_step(2, second) is None
    assert "mismatch/tokens" in first
    assert not second
    assert monitor.round == 2


def test_the_figures_go_under_the_frameworks_names_too_but_never_in_place_of_its_own(
    root: Handle, tmp_path: Path
) -> None:
    taken, free = list(measured(3).aliases())[:2]
    monitor, metrics = Monitor(tmp_path), {taken: "the framework's own"}
    monitor.add(measured(3))
    stats = monitor.end_step(1, metrics)
    assert stats is not None
    assert metrics[taken] == "the framework's own"
    assert metrics[free] == stats.aliases()[free]


def test_coverage_is_the_share_of_the_tokens_that_were_expected(root: Handle, tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, timeout_s=0.1)
    shares = []
    for expected in (12, 16, None):
        metrics: dict[str, Any] = {}
        monitor.observe(*log_probs())
        monitor.observe(*log_probs())
        monitor.expect(expected)
        monitor.end_step(len(shares), metrics)
        shares.append(metrics.get("mismatch/coverage"))
    monitor.flush()
    assert shares == [1.0, 0.75, None]
    assert [line["coverage"]["complete"] for line in lines_of(tmp_path / MISMATCH)] == [True, False, True]


def test_a_step_of_which_nothing_arrived_is_on_record_as_such(root: Handle, tmp_path: Path) -> None:
    monitor, metrics = Monitor(tmp_path, timeout_s=0.1), {}
    monitor.expect(100, ranks=4)
    assert monitor.end_step(3, metrics) is None
    monitor.flush()
    assert metrics == {"mismatch/coverage": 0.0}
    (line,) = lines_of(tmp_path / MISMATCH)
    assert (line["step"], line["metrics"]) == (3, {})
    assert (line["coverage"]["expected_tokens"], line["coverage"]["expected_ranks"]) == (100, 4)


def test_what_is_made_of_the_metrics_goes_on_the_line(root: Handle, tmp_path: Path) -> None:
    def annotate(step: int, metrics: Any) -> dict[str, Any]:
        return {"alerts": [{"step": step, "value": metrics["mismatch/tokens"]}]}

    monitor = Monitor(tmp_path, annotate=annotate)
    monitor.observe(*log_probs())
    monitor.end_step(3, {})
    monitor.flush()
    assert lines_of(tmp_path / MISMATCH)[0]["alerts"] == [{"step": 3, "value": 6.0}]


def test_a_root_that_hangs_costs_one_timeout_until_it_answers(
    root: Handle, clock: FakeRay, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = Monitor(tmp_path, timeout_s=2.0)

    def step() -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        monitor.observe(*log_probs())
        monitor.end_step(monitor.round, metrics)
        return metrics

    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        step()
        root.hangs = True
        while_hung = [step() for _ in range(3)]
        monitor.flush()
        root.hangs = False
        step(), step()
    assert clock.waited == [2.0, 2.0, IMPATIENT_S, IMPATIENT_S, IMPATIENT_S, IMPATIENT_S, 2.0]
    # What the driver knows itself it does not need the root for.
    assert [metrics["mismatch/tokens"] for metrics in while_hung] == [6.0, 6.0, 6.0]
    assert [record.getMessage() for record in caplog.records] == [
        "the mismatch monitor is late, training does not wait for it: no answer from run/root within 2.0 s"
    ]


def test_a_root_that_answers_late_is_waited_for_again(root: Handle, clock: FakeRay, tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, timeout_s=2.0)
    root.hangs = True
    monitor.end_step(1, {})
    monitor.end_step(2, {})
    monitor._unanswered[0].ended = True
    root.hangs = False
    monitor.end_step(3, {})
    monitor.end_step(4, {})
    assert clock.waited == [2.0, IMPATIENT_S, 2.0, 2.0]


def test_rounds_that_stay_incomplete_cost_one_timeout(root: Handle, tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, timeout_s=0.4)
    for expected in (9, 9, 6, 6):
        monitor.observe(*log_probs())
        monitor.expect(expected)
        monitor.end_step(monitor.round, {})
    full, short = ROOT_SHARE * 0.4, ROOT_SHARE * IMPATIENT_S
    assert root.waits == [full, short, short, full]


def test_what_a_root_that_hangs_cannot_take_is_dropped_and_counted(root: Handle, tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    root.hangs = True
    for step in range(1000):
        monitor.end_step(step, {})
    metrics: dict[str, Any] = {}
    monitor.end_step(1000, metrics)
    assert len(root.calls) - root.calls.index("gather") == MAX_PENDING
    # Three messages a step, of which the question is no record; 64 fit.
    assert metrics["mismatch/records_dropped"] == 2 * 1000 - (MAX_PENDING - 22)


def test_a_dead_root_is_one_warning_and_another_takes_its_place(
    root: Handle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = Monitor(tmp_path)
    root.dead = True
    successor = Handle(Root("run", str(tmp_path)))
    monkeypatch.setattr(ROOT_OF, lambda run, out_dir, sinks: successor)
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        for step in range(3):
            monitor.observe(*log_probs())
            monitor.end_step(step, {})
        monitor.flush()
    assert {line["step"] for line in lines_of(tmp_path / MISMATCH)} == {0, 1, 2}
    assert len(caplog.records) == 1


def test_a_monitor_that_fails_warns_once_and_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(run: str, out_dir: Path, sinks: tuple[str, ...]) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(ROOT_OF, broken)
    metrics: dict[str, Any] = {}
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        monitor = Monitor(Path("unused"), run="run")
        monitor.observe(torch.zeros(1, 2), torch.zeros(3, 4), torch.ones(1, 2))
        monitor.observe(*log_probs())
        monitor.end_step(1, metrics)
        monitor.write("plan.json", {})
        monitor.flush()
    assert [record.getMessage() for record in caplog.records] == [
        "the mismatch monitor failed, training goes on without it: no space left on device"
    ]
    assert metrics["mismatch/tokens"] == 6


def test_without_ray_there_is_a_warning_and_no_cluster_is_started(caplog: pytest.LogCaptureFixture) -> None:
    if ray.is_initialized():
        pytest.skip("this process is connected to Ray")
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        monitor = Monitor(Path("unused"))
        monitor.end_step(1, {})
    assert [record.getMessage() for record in caplog.records] == [
        "the mismatch monitor failed, training goes on without it: Ray is not initialized in this process"
    ]
    assert not ray.is_initialized()
