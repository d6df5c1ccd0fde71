"""Runs on each node: joins what the node's ranks report, and keeps it until the root asks."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fp16_patch.mismatch.collection import actors
from fp16_patch.mismatch.collection.part import Message, Part, join

Stamp = tuple[str, int]
"""Which aggregator process, and how many reports it had of the round."""

MAX_PENDING_CALLS = 16
"""Calls that one rank may leave with an aggregator that does not answer."""

OPEN_ROUNDS = 8
KNOWN_SENDERS = 1024


class Aggregator:
    """Hands nothing over for good: the root may ask again for what an answer lost or a restart forgot.

    After its own restart an aggregator knows nothing of before; the root keeps what it had from the former process.
    """

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._process = uuid.uuid4().hex
        self._rounds: dict[int, _Round] = {}
        self._last: dict[str, int] = {}

    def report(self, sender: str, number: int, round: int, message: Message) -> None:
        """Add a rank's report to its round, once.

        Args:
            sender: tells processes apart, those of the same rank too.
            number: of this sender's reports, ascending. A sender that got no answer sends the same report again.
        """
        if number <= self._last.get(sender, -1):
            return
        part = Part.unpack(message)
        self._last.pop(sender, None)
        self._last[sender] = number
        _keep_latest(self._last, KNOWN_SENDERS)
        known = self._rounds.get(round)
        if known is None:
            known = self._rounds[round] = _Round(Part(part.stats.empty(), dropped=self._give_up_oldest()))
        known.part, known.reports = join([known.part, part]), known.reports + 1

    def take(self, known: Mapping[int, Stamp | None]) -> dict[int, tuple[Stamp, Message]]:
        """Return all that is here of these rounds, where that is more than the asker knows of."""
        found = {number: self._rounds[number] for number in known if number in self._rounds}
        answer = {}
        for number, round in found.items():
            round.taken = round.reports
            stamp = (self._process, round.reports)
            if stamp != known[number]:
                answer[number] = (stamp, round.part.pack())
        return answer

    def forget(self) -> None:
        """Forget all rounds: another attempt at the run begins, which counts them anew."""
        self._rounds.clear()

    def _give_up_oldest(self) -> int:
        """Make room for a round. Returns the reports that nobody has asked for."""
        if len(self._rounds) < OPEN_ROUNDS:
            return 0
        oldest = self._rounds.pop(next(iter(self._rounds)))
        return oldest.reports - oldest.taken


@dataclass
class _Round:
    part: Part
    reports: int = 0
    taken: int = 0


def _keep_latest(entries: dict[str, int], count: int) -> None:
    while len(entries) > count:
        del entries[next(iter(entries))]


def aggregator_here(run: str) -> Any:
    """Return the handle of the run's aggregator on this node, created if there is none."""
    import ray

    name = actors.node_prefix(run) + ray.get_runtime_context().get_node_id()
    options = actors.options_here(name, max_task_retries=0, max_pending_calls=MAX_PENDING_CALLS)
    return ray.remote(Aggregator).options(**options).remote()
