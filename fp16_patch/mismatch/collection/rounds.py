"""Keeps what the root knows of the last few rounds: their parts, what is missing, and the line each comes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp16_patch.mismatch.collection.aggregator import Stamp
from fp16_patch.mismatch.collection.part import Message, Part, join

KEPT_ROUNDS = 4
DRIVER = "driver"


class Round:
    """Is one batch of training: what its ranks and the driver measured.

    Parts are kept by the process they come from: a later part of the same process replaces its former one, and a
    restarted aggregator's joins what its former process had.
    """

    def __init__(self) -> None:
        self.expected_tokens: int | None = None
        self._expected_ranks: int | None = None
        self._parts: dict[tuple[str, str], Message] = {}
        self._joined: Part | None = None
        self._stamps: dict[str, Stamp] = {}
        self._closing: dict[str, Any] | None = None
        self._changed = False

    def expect(self, tokens: int | None, ranks: int | None) -> None:
        self.expected_tokens, self._expected_ranks = tokens, ranks

    def put(self, name: str, stamp: Stamp, part: Message) -> None:
        self._stamps[name] = stamp
        self._parts[name, stamp[0]] = part
        self._joined, self._changed = None, True

    def put_driver(self, part: Message | None) -> None:
        if part is not None and self._parts.get((DRIVER, "")) != part:
            self._parts[DRIVER, ""] = part
            self._joined, self._changed = None, True

    def stamp(self, name: str) -> Stamp | None:
        return self._stamps.get(name)

    def joined(self) -> Part:
        if self._joined is None:
            self._joined = join([Part.unpack(part) for part in self._parts.values()])
        return self._joined

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self._parts.values())

    @property
    def ranks(self) -> int:
        return len(set[int]().union(*(part.ranks for part in self._parts.values())))

    @property
    def expected_ranks(self) -> int | None:
        """Return how many the driver expects, else as many as the ranks that reported say."""
        if self._expected_ranks is not None:
            return self._expected_ranks
        return max((part.world_size for part in self._parts.values() if part.world_size is not None), default=None)

    @property
    def expects(self) -> bool:
        """Whether there is something to wait for."""
        return self.expected_tokens is not None or self.expected_ranks is not None

    def complete(self) -> bool:
        """Return whether all expected tokens are here; all ranks, if no tokens were expected; true if nothing was."""
        if self.expected_tokens is not None:
            return self.tokens >= self.expected_tokens
        expected = self.expected_ranks
        return expected is None or self.ranks >= expected

    def coverage(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "expected_tokens": self.expected_tokens,
            "ranks": self.ranks,
            "expected_ranks": self.expected_ranks,
            "dropped": sum(part.dropped for part in self._parts.values()),
            "complete": self.complete(),
        }

    def close(self, closing: Mapping[str, Any]) -> None:
        """End the step: ``closing`` are the fields of its line that the driver knows."""
        self._closing = dict(closing)
        self._changed = bool(self._parts or self.expected_tokens)

    def line(self) -> dict[str, Any] | None:
        """Return the step's line; None before the step's end, and where it says nothing new."""
        if self._closing is None or not self._changed:
            return None
        self._changed = False
        part = self.joined()
        floor = {} if part.noise_floor is None else {"noise_floor": part.noise_floor.to_dict()}
        by_lag = {"by_lag": {str(lag): stats.to_dict() for lag, stats in part.by_lag.items()}} if part.by_lag else {}
        measured = {"metrics": part.metrics(), "state": part.stats.to_dict(), "coverage": self.coverage()}
        return {**self._closing, **measured, **floor, **by_lag}


class Rounds:
    """Keeps the rounds that are open, or closed so recently that late reports still count."""

    def __init__(self) -> None:
        self._rounds: dict[int, Round] = {}

    def __getitem__(self, number: int) -> Round:
        """Return the round, opened if it is new; the oldest is given up for it."""
        if number not in self._rounds:
            self._rounds[number] = Round()
            if len(self._rounds) > KEPT_ROUNDS:
                del self._rounds[next(iter(self._rounds))]
        return self._rounds[number]

    def __len__(self) -> int:
        return len(self._rounds)

    def stamps(self, name: str) -> dict[int, Stamp | None]:
        """Return what is known here of each round from this aggregator."""
        return {number: round.stamp(name) for number, round in self._rounds.items()}

    def put(self, number: int, name: str, stamp: Stamp, part: Message) -> None:
        """Add a part to its round, unless that was given up."""
        if number in self._rounds:
            self._rounds[number].put(name, stamp, part)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines to append now: of rounds just closed, and of those that late reports have changed."""
        return [line for round in self._rounds.values() if (line := round.line()) is not None]

    def clear(self) -> None:
        self._rounds.clear()
