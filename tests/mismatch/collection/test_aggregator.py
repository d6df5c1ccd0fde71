"""The node's actor, without Ray: what it keeps of the reports it gets."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fp16_patch.mismatch.collection.aggregator import KNOWN_SENDERS, OPEN_ROUNDS, Aggregator
from fp16_patch.mismatch.collection.part import Part
from tests.mismatch.measured import message


def taken(aggregator: Aggregator, round: int) -> Part:
    ((_, packed),) = aggregator.take({round: None}).values()
    return Part.unpack(packed)


def test_tokens_add_up_and_ranks_are_a_set() -> None:
    aggregator = Aggregator()
    aggregator.report("a", 1, 0, message(rank=0, tokens=4))
    aggregator.report("a", 2, 0, message(rank=0, tokens=3, dropped=2))
    aggregator.report("b", 1, 0, message(rank=1, tokens=5))
    part = taken(aggregator, 0)
    assert (part.stats.tokens, part.ranks, part.world_size, part.dropped) == (12, {0, 1}, 2, 2)


def test_a_report_that_was_sent_twice_counts_once() -> None:
    aggregator = Aggregator()
    for _ in range(2):
        aggregator.report("a", 1, 0, message(rank=0, tokens=4))
    aggregator.report("a, restarted", 1, 0, message(rank=0, tokens=4))
    assert taken(aggregator, 0).stats.tokens == 8


def test_an_answer_that_was_lost_can_be_had_again() -> None:
    aggregator = Aggregator()
    aggregator.report("a", 1, 0, message(rank=0))
    assert taken(aggregator, 0).stats.tokens == taken(aggregator, 0).stats.tokens == 4


def test_only_what_the_asker_does_not_know_is_sent() -> None:
    aggregator = Aggregator()
    aggregator.report("a", 1, 0, message(rank=0))
    ((stamp, _),) = aggregator.take({0: None}).values()
    assert aggregator.take({0: stamp, 1: None}) == {}
    aggregator.report("b", 1, 0, message(rank=1))
    assert aggregator.take({0: stamp}).keys() == {0}


def test_the_oldest_round_is_given_up_and_counted_unless_it_was_taken() -> None:
    aggregator = Aggregator()
    for number, round in enumerate(range(OPEN_ROUNDS)):
        aggregator.report("a", number, round, message(rank=0))
    aggregator.take({0: None})
    for round in (100, 101):
        aggregator.report("a", round, round, message(rank=0))
    assert aggregator.take({0: None, 1: None}) == {}
    assert [taken(aggregator, round).dropped for round in (100, 101)] == [0, 1]


def test_another_attempt_starts_from_nothing() -> None:
    aggregator = Aggregator()
    aggregator.report("a", 1, 0, message(rank=0))
    aggregator.forget()
    assert aggregator.take({0: None}) == {}


def test_it_does_not_grow_over_a_long_run() -> None:
    aggregator: Any = Aggregator()
    packed = message(rank=0)
    for round in range(1000):
        aggregator.report("a", round, round, packed)
        aggregator.report(f"{round}", 0, round, packed)
    assert len(aggregator._rounds) == OPEN_ROUNDS
    assert len(aggregator._last) <= KNOWN_SENDERS
    # The one that reports all along is not among the forgotten.
    aggregator.report("a", 999, 999, packed)
    assert taken(aggregator, 999).stats.tokens == 8
