"""Holds a part of a round, what some of the ranks measured in one batch, and joins parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fp16_patch.mismatch.statistics.summary import MismatchStats

_FLOOR_METRICS = ("mismatch/noise_floor_tokens", "mismatch/noise_floor_mean_abs", "mismatch/noise_floor_max_abs")


class Message(NamedTuple):
    """Is a part as it travels, and as it is kept while nobody needs its figures: a few KB."""

    stats: bytes
    noise_floor: bytes | None
    tokens: int
    ranks: tuple[int, ...]
    world_size: int | None
    dropped: int


@dataclass(frozen=True)
class Part:
    """Is what some of the ranks measured: tokens add up, ranks are a set, since a rank may report each micro-batch.

    Attributes:
        noise_floor: the learner against itself; None where nobody measured it.
        ranks: who measured; empty for what the driver measured itself.
        world_size: how many ranks report in all; None if nobody said.
        dropped: reports that were lost on the way here.
    """

    stats: MismatchStats
    noise_floor: MismatchStats | None = None
    ranks: frozenset[int] = frozenset()
    world_size: int | None = None
    dropped: int = 0

    def metrics(self) -> dict[str, float]:
        """Return the ``mismatch/*`` of the statistics and of the noise floor, if there is one; none without tokens."""
        if not self.stats.tokens:
            return {}
        floor = {} if self.noise_floor is None else self.noise_floor.metrics("mismatch/noise_floor_")
        return {**self.stats.metrics(), **{name: floor[name] for name in _FLOOR_METRICS if name in floor}}

    def pack(self) -> Message:
        floor = None if self.noise_floor is None else self.noise_floor.to_bytes()
        ranks = tuple(sorted(self.ranks))
        return Message(self.stats.to_bytes(), floor, self.stats.tokens, ranks, self.world_size, self.dropped)

    @classmethod
    def unpack(cls, message: Message) -> Part:
        """Undo ``pack``.

        Raises:
            ValueError: statistics of another version.
        """
        floor = None if message.noise_floor is None else MismatchStats.from_bytes(message.noise_floor)
        stats = MismatchStats.from_bytes(message.stats)
        return cls(stats, floor, frozenset(message.ranks), message.world_size, message.dropped)


def join(parts: Sequence[Part]) -> Part:
    """Join all parts; of no parts, make one without tokens."""
    floors = [part.noise_floor for part in parts if part.noise_floor is not None]
    return Part(
        stats=MismatchStats.merge_all(part.stats for part in parts),
        noise_floor=MismatchStats.merge_all(floors) if floors else None,
        ranks=frozenset().union(*(part.ranks for part in parts)),
        world_size=max((part.world_size for part in parts if part.world_size is not None), default=None),
        dropped=sum(part.dropped for part in parts),
    )
