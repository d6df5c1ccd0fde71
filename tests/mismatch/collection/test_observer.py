"""The learner rank's end: observing costs no time, and what is lost is counted."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ray = pytest.importorskip("ray")

from fp16_patch.mismatch.collection import observer
from fp16_patch.mismatch.collection.aggregator import Aggregator
from fp16_patch.mismatch.collection.observer import MAX_WAITING, HostCopy, Observer
from fp16_patch.mismatch.collection.part import Part
from tests.mismatch.measured import measured

DIED, UNAVAILABLE = ray.exceptions.ActorDiedError(), ray.exceptions.ActorUnavailableError("restarting", None)


class Node:
    """An aggregator's handle; the next calls fail as ``failures`` say, or wait for ``open``."""

    def __init__(self) -> None:
        self.aggregator = Aggregator()
        self.failures: list[Exception] = []
        self.called, self.open = threading.Event(), threading.Event()
        self.open.set()
        self.report = SimpleNamespace(remote=self._report)

    def _report(self, *arguments: Any) -> Any:
        self.called.set()
        self.open.wait()
        if self.failures:
            return self.failures.pop(0)
        return self.aggregator.report(*arguments)

    def part(self, round: int) -> Part:
        ((_, message),) = self.aggregator.take({round: None}).values()
        return Part.unpack(message)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    def get(result: Any, timeout: float) -> None:
        if isinstance(result, Exception):
            raise result

    handle = Node()
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(observer, "RESTART_POLL_S", 0.001)
    monkeypatch.setattr(observer, "aggregator_here", lambda run: handle)
    return handle


def settle(observed: Observer) -> None:
    assert observed._reports.flush(10.0)


def test_a_report_says_who_measured_what(node: Node) -> None:
    rank = Observer("run", rank=3, world_size=8)
    rank.observe(5, measured(4), noise_floor=measured(2, difference=0.25))
    rank.observe(5, measured(6))
    settle(rank)
    part = node.part(5)
    assert (part.stats.tokens, part.ranks, part.world_size, part.dropped) == (10, {3}, 8, 0)
    assert part.noise_floor is not None
    assert part.noise_floor.d_max == pytest.approx(0.25)


def test_an_aggregator_that_hangs_costs_reports_but_no_time_and_hears_how_many(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    rank = Observer("run", 0, 1)
    stats = measured(1)
    node.open.clear()
    rank.observe(0, stats)
    node.called.wait()
    for _ in range(MAX_WAITING + 7):
        rank.observe(0, stats)
    assert rank.dropped == 7
    node.failures = [ray.exceptions.GetTimeoutError("no answer")]
    node.open.set()
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        settle(rank)
    part = node.part(0)
    assert (part.stats.tokens, part.dropped, rank.dropped) == (MAX_WAITING, 8, 8)
    assert [record.getMessage() for record in caplog.records] == [
        "the mismatch of this rank is not all observed, training goes on: no answer"
    ]


def test_a_restarting_aggregator_is_waited_for_and_a_dead_one_replaced(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(observer, "aggregator_here", lambda run: found.append(run) or node)
    rank = Observer("run", 0, 1)
    node.failures = [UNAVAILABLE, UNAVAILABLE]
    rank.observe(0, measured(4))
    settle(rank)
    assert (node.part(0).stats.tokens, rank.dropped, found) == (4, 0, ["run"])
    node.failures = [DIED]
    rank.observe(1, measured(5))
    settle(rank)
    assert (node.part(1).stats.tokens, rank.dropped, found) == (5, 0, ["run", "run"])


def test_a_node_without_an_aggregator_is_one_warning(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(observer, "RESTART_TIMEOUT_S", 0.0)
    node.failures = [DIED] * 3
    rank = Observer("run", 0, 1)
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        for round in range(4):
            rank.observe(round, measured(4))
        settle(rank)
    assert len(caplog.records) == 1
    assert (node.part(3).stats.tokens, node.part(3).dropped) == (4, 3)


def test_what_is_no_statistics_is_a_warning_and_no_error(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        Observer("run", 0, 1).observe(0, None)  # type: ignore[arg-type]
    assert len(caplog.records) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_copy_from_a_gpu_holds_what_was_queued_before_it() -> None:
    stats = measured(5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        vector = stats.vector.pin_memory().to("cuda", non_blocking=True)
        copy = HostCopy(type(stats)(vector))
        started = not stream.query()
        vector.zero_()
    assert started, "the copy has waited for the stream"
    assert copy.wait().tokens == 5
