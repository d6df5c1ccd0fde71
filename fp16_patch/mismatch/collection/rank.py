"""A learner's rank observes the mismatch of its tokens, and now and then that of the learner with itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from fp16_patch.mismatch.collection.guard import Guard
from fp16_patch.mismatch.collection.observer import Observer
from fp16_patch.mismatch.statistics.summary import MismatchStats

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")

guard = Guard(logger, "the mismatch is not observed on this rank, training goes on")
_observers: dict[str, Observer] = {}


def observe(
    run: str, rank: int, size: int, round: int, measure: Callable[[], MismatchStats], noise_floor: MismatchStats | None
) -> None:
    """Report what this rank measures of a round; an error is one warning.

    Args:
        run: the name that the driver's monitor has.
        rank: among the ranks that have sequences of their own.
        size: number of those.
        measure: compares both sides of this rank's sequences.
        noise_floor: of `noise_floor`.
    """
    guard.run(lambda: _observer_of(run, rank, size).observe(round, measure(), noise_floor))


def noise_floor(
    choose: Callable[[], Batch | None], score: Callable[[Batch], MismatchStats | None]
) -> MismatchStats | None:
    """Measure the learner against itself: a few sequences are scored once more, each alone. An error is one warning.

    Every rank of the process group calls this, because the forward passes of a sharded model gather its parameters from
    all. So they begin only if the choice succeeded on every rank: where one had stopped at an error of its own, the
    others would wait for it forever.

    Args:
        choose: picks the sequences, without any communication; None where scoring them again says nothing.
        score: scores them with as many forward passes on every rank, and compares.

    Returns:
        This rank's part; None if nothing was scored.
    """
    chosen = guard.run(choose)
    agreed = guard.run(lambda: _on_every_rank(chosen is not None))
    if chosen is None or not agreed:
        return None
    return guard.run(lambda: score(chosen))


def rows_to_rescore(rows: int, share: float) -> list[int]:
    """Choose about ``share`` of the rows, at least one, evenly spread: as many on ranks with equally many rows."""
    count = min(rows, max(1, round(rows * share)))
    return [index * rows // count for index in range(count)]


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
