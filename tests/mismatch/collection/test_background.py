"""Work in the background: its caller does not wait, and what is lost is counted."""

from __future__ import annotations

import logging
import threading

import pytest

from fp16_patch.mismatch.collection.background import Background
from fp16_patch.plan.guard import Guard

logger = logging.getLogger("fp16_patch.test")


def test_items_are_worked_off_in_order() -> None:
    done: list[int] = []
    background = Background(done.append, 100, Guard(logger, "failed"))
    for item in range(50):
        background.put(item)
    assert background.flush(10.0)
    assert (done, background.dropped) == (list(range(50)), 0)


def test_what_does_not_fit_is_dropped_and_counted() -> None:
    busy, release = threading.Event(), threading.Event()
    done: list[int] = []

    def work(item: int) -> None:
        busy.set()
        release.wait()
        done.append(item)

    background = Background(work, 3, Guard(logger, "failed"))
    background.put(0)
    busy.wait()
    for item in range(1, 1001):
        background.put(item)
    assert not background.flush(0.01)
    release.set()
    assert background.flush(10.0)
    assert (done, background.dropped) == ([0, 1, 2, 3], 997)


def test_failures_are_counted_and_the_first_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    background = Background(lambda item: 1 // item, 10, Guard(logger, "the division failed, counting goes on"))
    with caplog.at_level(logging.WARNING, logger="fp16_patch"):
        for item in (0, 1, 0, 0):
            background.put(item)
        assert background.flush(10.0)
    assert background.dropped == 3
    assert [record.getMessage() for record in caplog.records] == [
        "the division failed, counting goes on: integer division or modulo by zero"
    ]
