"""A learner's rank observes the mismatch of its tokens, and now and then that of the learner with itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from fp16_patch.mismatch.collection.observer import Observer
from fp16_patch.mismatch.statistics.by_lag import Lags
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.plan.errors import RankLeftAlone
from fp16_patch.plan.guard import Guard

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")

guard = Guard(logger, "the mismatch is not observed on this rank, training goes on")
_observers: dict[str, Observer] = {}

OTHERS_TIMEOUT_S = 300.0
"""How long a rank whose scoring failed waits for the others to be through with theirs."""
_POLL_S = 0.1
_scorings = 0


def observe(
    run: str,
    rank: int,
    size: int,
    round: int,
    measure: Callable[[], tuple[MismatchStats, Lags]],
    noise_floor: MismatchStats | None,
) -> None:
    """Report what this rank measures of a round; an error is one warning.

    Args:
        run: the name that the driver's monitor has.
        rank: among the ranks that have sequences of their own.
        size: number of those.
        measure: compares both sides of this rank's sequences, and by lag where that is known.
        noise_floor: of `noise_floor`.
    """
    guard.run(lambda: _report(_observer_of(run, rank, size), round, measure, noise_floor))


def noise_floor(
    choose: Callable[[], Batch | None], score: Callable[[Batch], MismatchStats | None]
) -> MismatchStats | None:
    """Measure the learner against itself: a few sequences are scored once more, each alone. An error is one warning.

    Every rank of the process group calls this, because the forward passes of a sharded model gather its parameters from
    all. So they begin only if the choice succeeded on every rank: where one had stopped at an error of its own, the
    others would wait for it forever. For the same reason a rank whose scoring fails goes on only once the others are
    through with theirs.

    Args:
        choose: picks the sequences, without any communication; None where scoring them again says nothing.
        score: scores them with as many forward passes on every rank, and compares.

    Returns:
        This rank's part; None if nothing was scored.

    Raises:
        RankLeftAlone: scoring failed here, and another rank is held up in it.
    """
    chosen = guard.run(choose)
    agreed = guard.run(lambda: _on_every_rank(chosen is not None))
    if chosen is None or not agreed:
        return None
    scoring = _Scoring()
    try:
        floor = score(chosen)
    except Exception as failure:
        guard.warn(failure)
        if not scoring.others_get_through():
            raise RankLeftAlone(failure, OTHERS_TIMEOUT_S) from failure
        return None
    scoring.is_through()
    return floor


class _Scoring:
    """One scoring of all ranks, who tell each other that they are through with it.

    By the process group's store and not by a collective: with one, a rank that failed would answer what the others ask
    for in their forward passes.
    """

    def __init__(self) -> None:
        global _scorings
        _scorings += 1
        self._key = f"fp16_patch/scored/{_scorings}"

    def is_through(self) -> None:
        """Tell the other ranks that this one has left its forward passes."""
        if distributed.is_initialized():
            _get_default_store().add(self._key, 1)

    def others_get_through(self) -> bool:
        """Tell the same, and return whether all have, before the time is up."""
        if not distributed.is_initialized():
            return True
        store, until = _get_default_store(), time.monotonic() + OTHERS_TIMEOUT_S
        through = store.add(self._key, 1)
        while through < distributed.get_world_size():
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_S)
            through = store.add(self._key, 0)
        return True


def rows_to_rescore(rows: int, share: float) -> list[int]:
    """Choose about ``share`` of the rows, at least one, evenly spread: as many on ranks with equally many rows."""
    count = min(rows, max(1, round(rows * share)))
    return [index * rows // count for index in range(count)]


def _report(
    observer: Observer,
    round: int,
    measure: Callable[[], tuple[MismatchStats, Lags]],
    noise_floor: MismatchStats | None,
) -> None:
    stats, by_lag = measure()
    observer.observe(round, stats, noise_floor, by_lag)


def _observer_of(run: str, rank: int, size: int) -> Observer:
    if run not in _observers:
        _observers.clear()
        _observers[run] = Observer(run, rank, size)
    return _observers[run]


def _on_every_rank(fact: bool) -> bool:
    if not distributed.is_initialized():
        return fact
    facts: list[bool] = [fact] * distributed.get_world_size()
    distributed.all_gather_object(facts, fact)
    return all(facts)
