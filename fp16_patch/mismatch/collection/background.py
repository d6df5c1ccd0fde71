"""Works off a bounded queue in one daemon thread, so that whoever fills it never waits."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from fp16_patch.plan.guard import Guard

Item = TypeVar("Item")


class Background(Generic[Item]):
    """Does the work in the order of ``put``. What does not fit, or fails, is dropped and counted.

    Args:
        work: called in the thread, once an item; what it raises is the guard's.
        capacity: items that may wait.
    """

    def __init__(self, work: Callable[[Item], None], capacity: int, guard: Guard) -> None:
        self._work = work
        self._guard = guard
        self._queue: queue.Queue[Item | threading.Event] = queue.Queue(capacity)
        self._thread: threading.Thread | None = None
        # Each is written by one thread alone.
        self._refused = 0
        self._failed = 0

    @property
    def dropped(self) -> int:
        """Count the items that did not fit or failed, so far."""
        return self._refused + self._failed

    def put(self, item: Item) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work_off, name="fp16_patch", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._refused += 1

    def flush(self, timeout_s: float) -> bool:
        """Wait for what is in the queue now; False if that took too long."""
        if self._thread is None:
            return True
        reached = threading.Event()
        try:
            self._queue.put(reached, timeout=timeout_s)
        except queue.Full:
            return False
        return reached.wait(timeout_s)

    def _work_off(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
            else:
                self._do(item)
            del item  # may be large, and the next may be long in coming

    def _do(self, item: Item) -> None:
        try:
            self._work(item)
        except Exception as failure:
            self._failed += 1
            self._guard.warn(failure)
