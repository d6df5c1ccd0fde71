"""The job's actor, with nodes that are no processes: what a step comes to, and what it does not wait for."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fp16_patch.mismatch.collection import actors
from fp16_patch.mismatch.collection.aggregator import Aggregator
from fp16_patch.mismatch.collection.history import KEPT_STEPS
from fp16_patch.mismatch.collection.part import Part
from fp16_patch.mismatch.collection.root import Root
from fp16_patch.mismatch.collection.rounds import KEPT_ROUNDS
from fp16_patch.mismatch.collection.sinks import MAX_WAITING
from fp16_patch.mismatch.record.reading import MISMATCH
from fp16_patch.mismatch.statistics.summary import MismatchStats
from tests.mismatch.measured import measured, message

Nodes = dict[str, Any]

PATIENCE_S = 60.0
"""What a round waits for parts that do come: a machine may be busy."""

BRIEFLY_S = 1.0
"""For one that does not come, beside others that do."""


class Node:
    """An aggregator's handle, as far as the root uses one."""

    def __init__(self, hangs: bool = False) -> None:
        self.aggregator = Aggregator()
        self.asked, self._sent, self._hangs = 0, 0, hangs
        self.take = SimpleNamespace(remote=self._take)
        self.forget = SimpleNamespace(remote=self.aggregator.forget)

    def report(self, round: int, rank: int, tokens: int = 4, dropped: int = 0) -> None:
        self._sent += 1
        self.aggregator.report("rank", self._sent, round, message(rank, tokens, dropped=dropped))

    async def _take(self, known: dict[int, Any]) -> Any:
        self.asked += 1
        if self._hangs:
            await asyncio.sleep(3600)
        return self.aggregator.take(known)


class Dead(Node):
    async def _take(self, known: dict[int, Any]) -> Any:
        raise RuntimeError("the actor died")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    found: Nodes = {"a": Node(), "b": Node()}
    monkeypatch.setattr(actors, "aggregators_of", lambda run, known: dict(found))
    return found


def play(out_dir: Path, scene: Callable[[Root], Coroutine[Any, Any, None]], sinks: tuple[str, ...] = ()) -> Root:
    root = Root("run", str(out_dir), sinks)

    async def played() -> None:
        await scene(root)
        assert await root.flush(10.0)

    asyncio.run(played())
    return root


async def end_step(root: Root, number: int, tokens: int | None = 8, wait_s: float = PATIENCE_S) -> dict[str, Any]:
    answer = await root.gather(number, tokens, None, None, wait_s)
    root.close(number, tokens, None, None, {"step": number + 1, "time": 0.0, "attempt": "first"})
    return answer


def record(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / MISMATCH).read_text().splitlines()]


def test_a_step_is_what_all_nodes_have_of_its_round(nodes: Nodes, tmp_path: Path) -> None:
    async def scene(root: Root) -> None:
        nodes["a"].report(round=0, rank=0, tokens=4)
        nodes["b"].report(round=0, rank=1, tokens=5, dropped=1)
        nodes["b"].report(round=1, rank=1, tokens=7)
        answer = await end_step(root, 0, tokens=9)
        assert Part.unpack(answer["part"]).stats.tokens == 9

    play(tmp_path, scene)
    (line,) = record(tmp_path)
    assert MismatchStats.from_dict(line["state"]).tokens == line["metrics"]["mismatch/tokens"] == 9
    assert (line["step"], line["attempt"]) == (1, "first")
    assert line["coverage"] == {
        "tokens": 9,
        "expected_tokens": 9,
        "ranks": 2,
        "expected_ranks": 2,
        "dropped": 1,
        "complete": True,
    }


def test_what_the_driver_measured_joins_what_the_ranks_did(nodes: Nodes, tmp_path: Path) -> None:
    async def scene(root: Root) -> None:
        nodes["a"].report(round=0, rank=0, tokens=4)
        driver = Part(measured(6), noise_floor=measured(3, difference=0.25)).pack()
        answer = await root.gather(0, 10, None, driver, PATIENCE_S)
        assert answer["coverage"]["complete"]
        root.close(0, 10, None, driver, {"step": 1})

    play(tmp_path, scene)
    (line,) = record(tmp_path)
    assert line["metrics"]["mismatch/tokens"] == 10
    assert line["metrics"]["mismatch/noise_floor_mean_abs"] == pytest.approx(0.25)
    assert MismatchStats.from_dict(line["noise_floor"]).tokens == 3


def test_a_step_waits_for_a_rank_that_is_slow(nodes: Nodes, tmp_path: Path) -> None:
    async def scene(root: Root) -> None:
        nodes["a"].report(round=0, rank=0)
        asyncio.get_running_loop().call_later(0.15, lambda: nodes["b"].report(round=0, rank=1))
        assert (await end_step(root, 0))["coverage"]["complete"]

    play(tmp_path, scene)


def test_without_an_expectation_the_ranks_say_how_many_they_are(nodes: Nodes, tmp_path: Path) -> None:
    async def scene(root: Root) -> None:
        nodes["a"].report(round=0, rank=0)
        assert not (await end_step(root, 0, tokens=None, wait_s=BRIEFLY_S))["coverage"]["complete"]
        nodes["b"].report(round=0, rank=1)
        assert (await root.gather(0, None, None, None, PATIENCE_S))["coverage"]["complete"]

    play(tmp_path, scene)


def test_where_nothing_is_expected_nothing_is_waited_for(nodes: Nodes, tmp_path: Path) -> None:
    async def scene(root: Root) -> None:
        started = time.monotonic()
        await end_step(root, 0, tokens=None, wait_s=60.0)
        assert time.monotonic() - started < 30.0

    play(tmp_path, scene)
    assert not (tmp_path / MISMATCH).exists()


def test_a_report_after_the_step_has_ended_makes_a_line_that_replaces_the_first(nodes: Nodes, tmp_path: Path) -> None:
    async def scene(root: Root) -> None:
        nodes["a"].report(round=0, rank=0)
        first = await end_step(root, 0, wait_s=BRIEFLY_S)
        nodes["b"].report(round=0, rank=1)
        for rank, node in enumerate(nodes.values()):
            node.report(round=1, rank=rank)
        second, third = await end_step(root, 1), await root.gather(1, 8, None, None, PATIENCE_S)
        assert [answer["recovered"] for answer in (first, second, third)] == [False, True, False]

    play(tmp_path, scene)
    seen = [(line["step"], line["coverage"]["tokens"], line["coverage"]["complete"]) for line in record(tmp_path)]
    assert seen == [(1, 4, False), (1, 8, True), (2, 8, True)]


def test_the_last_late_report_is_fetched_at_the_end(nodes: Nodes, tmp_path: Path) -> None:
    async def scene(root: Root) -> None:
        nodes["a"].report(round=0, rank=0)
        await end_step(root, 0, wait_s=BRIEFLY_S)
        nodes["b"].report(round=0, rank=1)

    root = play(tmp_path, scene)
    assert record(tmp_path)[-1]["coverage"]["complete"]
    assert [line["coverage"]["tokens"] for line in root.history(10)] == [8]


def test_a_node_that_hangs_is_asked_once_and_keeps_nobody_waiting(nodes: Nodes, tmp_path: Path) -> None:
    nodes["b"] = Node(hangs=True)

    async def scene(root: Root) -> None:
        for number in range(5):
            nodes["a"].report(number, rank=0)
            answer = await end_step(root, number, tokens=4, wait_s=60.0)
            assert answer["coverage"]["complete"]
        answer = await end_step(root, 5, tokens=4, wait_s=BRIEFLY_S)
        assert not answer["coverage"]["complete"]
        assert nodes["b"].asked == 1

    started = time.monotonic()
    play(tmp_path, scene)
    assert time.monotonic() - started < 30.0


def test_the_place_of_a_dead_node_is_taken_by_the_one_of_the_same_name(nodes: Nodes, tmp_path: Path) -> None:
    alive = nodes["b"]
    nodes["b"] = Dead()

    async def scene(root: Root) -> None:
        nodes["a"].report(round=0, rank=0)
        alive.report(round=0, rank=1)
        assert not (await root.gather(0, 8, None, None, BRIEFLY_S))["coverage"]["complete"]
        nodes["b"] = alive
        assert (await root.gather(0, 8, None, None, PATIENCE_S))["coverage"]["complete"]

    play(tmp_path, scene)


def test_an_aggregator_that_restarted_adds_to_what_it_had_reported(nodes: Nodes, tmp_path: Path) -> None:
    async def scene(root: Root) -> None:
        nodes["a"].report(round=0, rank=0)
        while not (await root.gather(0, 8, None, None, BRIEFLY_S))["coverage"]["tokens"]:
            pass
        nodes["a"].aggregator = Aggregator()
        nodes["a"].report(round=0, rank=1)
        assert (await root.gather(0, 8, None, None, PATIENCE_S))["coverage"]["complete"]

    play(tmp_path, scene)


def test_another_attempt_counts_its_rounds_anew(nodes: Nodes, tmp_path: Path) -> None:
    async def scene(root: Root) -> None:
        nodes["a"].report(round=0, rank=0)
        await end_step(root, 0, tokens=4)
        await root.begin(str(tmp_path / "resumed"))
        nodes["a"].report(round=0, rank=0, tokens=3)
        answer = await end_step(root, 0, tokens=3)
        assert answer["coverage"]["tokens"] == 3

    play(tmp_path, scene)
    assert [line["metrics"]["mismatch/tokens"] for line in record(tmp_path / "resumed")] == [3]


def test_nothing_grows_over_a_thousand_steps(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a line costs to put together is no matter here.
    monkeypatch.setattr(MismatchStats, "to_dict", lambda self: {})
    monkeypatch.setattr(MismatchStats, "metrics", lambda self, prefix="": {})

    async def scene(root: Root) -> None:
        for number in range(1000):
            if number % 100 == 99:
                # The writer is not to be behind: here a step takes no time.
                await root.flush(10.0)
            for rank, node in enumerate(nodes.values()):
                node.report(number, rank)
            await end_step(root, number)

    root: Any = play(tmp_path, scene)
    assert len(root._rounds) == KEPT_ROUNDS
    assert len(root.history(1000)) == KEPT_STEPS
    assert not root._asked
    assert root._nodes.keys() == nodes.keys()
    assert len(record(tmp_path)) == 1000


class Seen:
    """A sink that remembers."""

    lines: list[tuple[str, int, int]] = []

    def __init__(self, run: str) -> None:
        self._run = run

    def __call__(self, line: dict[str, Any]) -> None:
        self.lines.append((self._run, line["step"], line["coverage"]["tokens"]))


class Broken:
    """A sink that raises."""

    def __init__(self, run: str) -> None:
        pass

    def __call__(self, line: dict[str, Any]) -> None:
        raise OSError("no route to host")


class Stuck:
    """A sink that takes longer than any test."""

    begun = threading.Event()

    def __init__(self, run: str) -> None:
        pass

    def __call__(self, line: dict[str, Any]) -> None:
        self.begun.set()
        time.sleep(3600)


TAKEN_BY_STUCK = 1 + MAX_WAITING
"""Lines that it does not drop: the one in work, and those that wait."""


def test_a_sink_that_hangs_or_raises_harms_neither_the_others_nor_the_record(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Seen.lines.clear()
    Stuck.begun.clear()
    sinks = tuple(f"{__name__}:{name}" for name in ("Stuck", "Broken", "Seen", "Absent"))

    async def scene(root: Root) -> None:
        for number in range(20):
            nodes["a"].report(number, rank=0)
            await end_step(root, number, tokens=4)
            # So that only the sink that hangs can be behind.
            put = number + 1
            dropped = 2 * put + max(0, put - TAKEN_BY_STUCK)
            while not (Stuck.begun.is_set() and len(Seen.lines) == put and root._sinks.dropped == dropped):
                await asyncio.sleep(0.001)

    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        root: Any = play(tmp_path, scene, sinks)
    assert Seen.lines == [("run", step, 4) for step in range(1, 21)]
    assert len(record(tmp_path)) == 20
    # 20 of each of those that fail, and of the one that hangs what does not fit.
    assert root._sinks.dropped == 20 + 20 + 20 - TAKEN_BY_STUCK
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"the mismatch does not all reach {sinks[3]}: module {__name__!r} has no attribute 'Absent'",
        f"the mismatch does not all reach {sinks[1]}: no route to host",
    ]


def test_a_sink_is_not_taken_back_to_an_earlier_step(nodes: Nodes, tmp_path: Path) -> None:
    Seen.lines.clear()

    async def scene(root: Root) -> None:
        await end_step(root, 0, wait_s=0.01)
        await end_step(root, 1, wait_s=0.01)
        nodes["a"].report(round=0, rank=0)
        await end_step(root, 2, wait_s=0.01)
        while len(Seen.lines) < 3:
            await asyncio.sleep(0.001)

    play(tmp_path, scene, (f"{__name__}:Seen",))
    assert [step for _, step, _ in Seen.lines] == [1, 2, 3]
    assert [line["step"] for line in record(tmp_path)] == [1, 2, 1, 3]
