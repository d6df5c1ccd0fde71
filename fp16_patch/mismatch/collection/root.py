"""Runs once a job: asks every node for its part of a round, and puts the step on record."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import torch

from fp16_patch.mismatch.collection import actors
from fp16_patch.mismatch.collection.history import History
from fp16_patch.mismatch.collection.part import Message
from fp16_patch.mismatch.collection.rounds import Round, Rounds
from fp16_patch.mismatch.collection.sinks import Sinks
from fp16_patch.mismatch.collection.writer import Writer
from fp16_patch.mismatch.record.reading import MISMATCH

ROOT_RETRIES = 3
"""What is asked of a restarting root is asked again: no question to it does harm when asked twice."""

POLL_S = 0.02
MAX_PAUSE_S = 0.2
LATE_REPORTS_S = 1.0


class Root:
    """Runs on the driver's node. Asking it twice does no harm.

    After a restart it knows nothing: it finds the aggregators by name, and they still have the last rounds. What is on
    disk is never read.

    Args:
        run: the run's name.
        out_dir: directory of the record.
        sinks: ``module:class`` of each, see ``Sinks``.
    """

    def __init__(self, run: str, out_dir: str, sinks: tuple[str, ...] = ()) -> None:
        torch.set_num_threads(1)
        self._run = run
        self._rounds = Rounds()
        self._writer = Writer(Path(out_dir))
        self._sinks = Sinks(sinks, run)
        self._history = History()
        self._nodes: dict[str, Any] = {}
        # A node that has not answered yet is not asked again.
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._lookup: asyncio.Task[None] | None = None
        self._recovered = False

    async def begin(self, out_dir: str) -> None:
        """Begin another attempt at the run, which counts its rounds anew and may have another directory."""
        self._rounds.clear()
        if Path(out_dir) != self._writer.out_dir:
            self._writer = Writer(Path(out_dir))
        await self._find_nodes()
        for node in self._nodes.values():
            node.forget.remote()

    async def gather(
        self, number: int, tokens: int | None, ranks: int | None, driver: Message | None, wait_s: float
    ) -> dict[str, Any]:
        """Return what there is of a round, once it is complete or the time is over.

        Args:
            tokens: expected; None if nobody knows. The same for ``ranks``.
            driver: what the driver measured itself.

        Returns:
            ``part``: all of the round, packed; ``coverage``: as in the record; ``recovered``: whether late reports have
            completed an earlier round since the last call; ``unwritten``: records lost in this process so far.
        """
        round = self._open(number, tokens, ranks, driver)
        until = asyncio.get_running_loop().time() + wait_s
        if not self._nodes or not round.expects:
            await self._find_nodes(wait_s)
        await self._ask_nodes(round, until)
        await self._ask_until_complete(round, until)
        self._put_on_record()
        recovered, self._recovered = self._recovered, False
        return {
            "part": round.joined().pack(),
            "coverage": round.coverage(),
            "recovered": recovered,
            "unwritten": self._writer.dropped + self._sinks.dropped,
        }

    def close(
        self, number: int, tokens: int | None, ranks: int | None, driver: Message | None, closing: dict[str, Any]
    ) -> None:
        """End the step: put its line on record, and once more when late reports change it.

        Args:
            closing: fields of the line: step, time, attempt, and what else the driver knows.
        """
        self._open(number, tokens, ranks, driver).close(closing)
        self._put_on_record()

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Put a step's line on record in the file of that name."""
        self._history.add(name, line)
        self._writer.append(name, line)
        # What watches a run shows its newest step; a correction of an earlier one would take it back.
        if line["step"] == self._history.newest():
            self._sinks.put(line)

    def write(self, name: str, document: dict[str, Any]) -> None:
        self._writer.write(name, document)

    async def flush(self, wait_s: float) -> bool:
        """Fetch what was reported late and wait for the disk; False if that took too long."""
        until = asyncio.get_running_loop().time() + min(wait_s, LATE_REPORTS_S)
        await self._ask_nodes(None, until)
        self._put_on_record()
        return await asyncio.to_thread(self._writer.flush, wait_s)

    def history(self, last: int) -> list[dict[str, Any]]:
        """Return the lines of the last so many steps, of `mismatch.jsonl` and `steps.jsonl`, without statistics."""
        return self._history.lines(last)

    def _open(self, number: int, tokens: int | None, ranks: int | None, driver: Message | None) -> Round:
        round = self._rounds[number]
        round.expect(tokens, ranks)
        round.put_driver(driver)
        return round

    async def _ask_until_complete(self, round: Round, until: float) -> None:
        pause, time = POLL_S, asyncio.get_running_loop().time
        while not round.complete() and time() + pause < until:
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_S)
            await self._find_nodes(max(0.0, until - time()))
            await self._ask_nodes(round, until)

    async def _find_nodes(self, timeout_s: float | None = None) -> None:
        """Look the aggregators up; what the cluster does not answer in time is there for the next question."""
        if self._lookup is None or self._lookup.done():
            self._lookup = asyncio.ensure_future(self._look_up())
        await asyncio.wait([self._lookup], timeout=timeout_s)

    async def _look_up(self) -> None:
        # Without an answer, those known stay.
        with contextlib.suppress(Exception):
            self._nodes = await asyncio.to_thread(actors.aggregators_of, self._run, dict(self._nodes))

    async def _ask_nodes(self, round: Round | None, until: float) -> None:
        """Ask all nodes that are free; wait for them, or until the round is complete, or the time is over."""
        asked = {name: asyncio.ensure_future(self._ask(name)) for name in self._nodes.keys() - self._asked.keys()}
        self._asked |= asked
        pending, time = set(asked.values()), asyncio.get_running_loop().time
        while pending and time() < until and not (round and round.expects and round.complete()):
            _, pending = await asyncio.wait(pending, timeout=min(POLL_S, max(0.0, until - time())))

    async def _ask(self, name: str) -> None:
        try:
            answer = await self._nodes[name].take.remote(self._rounds.stamps(name))
            for number, (stamp, message) in answer.items():
                self._rounds.put(number, name, stamp, message)
        except Exception:
            # Dead, or restarting. If it lives on, its name is found again.
            self._nodes.pop(name, None)
        finally:
            del self._asked[name]

    def _put_on_record(self) -> None:
        for line in self._rounds.lines():
            former = self._history.line(MISMATCH, line["step"])
            self._recovered |= bool(former and line["coverage"]["complete"] and not former["coverage"]["complete"])
            self.append(MISMATCH, line)


def root_of(run: str, out_dir: Path, sinks: tuple[str, ...] = ()) -> Any:
    """Return the handle of the run's root, created on this node if there is none."""
    import ray

    options = actors.options_here(actors.root_name(run), max_task_retries=ROOT_RETRIES)
    return ray.remote(Root).options(**options).remote(run, str(out_dir), sinks)
