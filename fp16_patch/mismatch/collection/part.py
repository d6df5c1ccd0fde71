"""Holds a part of a round, what some of the ranks measured in one batch, and joins parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fp16_patch.mismatch.statistics.by_lag import Lags, lag_metrics, merge_by_lag
from fp16_patch.mismatch.statistics.summary import MismatchStats

_FLOOR_METRICS = ("mismatch/noise_floor_tokens", "mismatch/noise_floor_mean_abs", "mismatch/noise_floor_max_abs")


class Message(NamedTuple):
    """Is a part as it travels, and as it is kept while nobody needs its figures: a few KB, and as much for each lag."""

    stats: bytes
    noise_floor: bytes | None
    tokens: int
    ranks: tuple[int, ...]
    world_size: int | None
    dropped: int
    by_lag: Mapping[int, bytes]


@dataclass(frozen=True)
class Part:
    """Is what some of the ranks measured: tokens add up, ranks are a set, since a rank may report each micro-batch.

    Attributes:
        noise_floor: the learner against itself; None where nobody measured it.
        ranks: who measured; empty for what the driver measured itself.
        world_size: how many ranks report in all; None if nobody said.
        dropped: reports that were lost on the way here.
        by_lag: of the same tokens, those whose lag is known; empty where nobody asked for lags.
    """

    stats: MismatchStats
    noise_floor: MismatchStats | None = None
    ranks: frozenset[int] = frozenset()
    world_size: int | None = None
    dropped: int = 0
    by_lag: Lags = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Return the ``mismatch/*``: of all tokens, by lag and of the noise floor, if these are known; none of none."""
        if not self.stats.tokens:
            return {}
        floor = {} if self.noise_floor is None else self.noise_floor.metrics("mismatch/noise_floor_")
        return {
            **self.stats.metrics(),
            **lag_metrics(self.by_lag, self.stats.tokens),
            **{name: floor[name] for name in _FLOOR_METRICS if name in floor},
        }

    def pack(self) -> Message:
        floor = None if self.noise_floor is None else self.noise_floor.to_bytes()
        ranks = tuple(sorted(self.ranks))
        by_lag = {lag: stats.to_bytes() for lag, stats in self.by_lag.items() if stats.tokens}
        return Message(self.stats.to_bytes(), floor, self.stats.tokens, ranks, self.world_size, self.dropped, by_lag)

    @classmethod
    def unpack(cls, message: Message) -> Part:
        """Undo ``pack``.

        Raises:
            ValueError: statistics of another version.
        """
        floor = None if message.noise_floor is None else MismatchStats.from_bytes(message.noise_floor)
        stats = MismatchStats.from_bytes(message.stats)
        by_lag = {lag: MismatchStats.from_bytes(state) for lag, state in message.by_lag.items()}
        return cls(stats, floor, frozenset(message.ranks), message.world_size, message.dropped, by_lag)


def join(parts: Sequence[Part]) -> Part:
    """Join all parts; of no parts, make one without tokens."""
    floors = [part.noise_floor for part in parts if part.noise_floor is not None]
    return Part(
        stats=MismatchStats.merge_all(part.stats for part in parts),
        noise_floor=MismatchStats.merge_all(floors) if floors else None,
        ranks=frozenset().union(*(part.ranks for part in parts)),
        world_size=max((part.world_size for part in parts if part.world_size is not None), default=None),
        dropped=sum(part.dropped for part in parts),
        by_lag=merge_by_lag(part.by_lag for part in parts),
    )
