"""Waiting: who never answers costs one full wait, who answers late a few."""

from __future__ import annotations

from fp16_patch.mismatch.collection.patience import IMPATIENT_S, Patience

FULL_S = 2.0


def waits(patience: Patience, steps: int, late: bool) -> list[float]:
    waited = []
    for _ in range(steps):
        waited.append(patience.wait_s(FULL_S))
        patience.disappointed()
        if late:
            patience.answered_late()
    return waited


def test_who_never_answers_costs_one_full_wait() -> None:
    assert waits(Patience(), 1000, late=False) == [FULL_S] + 999 * [IMPATIENT_S]


def test_who_always_answers_late_is_waited_for_ever_more_rarely() -> None:
    waited = waits(Patience(), 1000, late=True)
    assert [step for step, wait in enumerate(waited) if wait == FULL_S] == [0, 1, 3, 7, 15, 31, 63, 127, 255, 511]


def test_an_answer_in_time_restores_patience() -> None:
    patience = Patience()
    waits(patience, 10, late=True)
    patience.answered()
    assert waits(patience, 4, late=True) == [FULL_S, FULL_S, IMPATIENT_S, FULL_S]


def test_a_wait_is_never_longer_than_it_may() -> None:
    patience = Patience()
    waits(patience, 2, late=False)
    assert patience.wait_s(IMPATIENT_S / 2) == IMPATIENT_S / 2
