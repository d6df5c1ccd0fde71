"""Sends a step's line elsewhere than to the disk: to callables that are named in the configuration."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from fp16_patch.mismatch.collection.background import Background
from fp16_patch.plan.guard import Guard

logger = logging.getLogger(__name__)

Line = dict[str, Any]
MAX_WAITING = 16


class Sinks:
    """Gives each sink a thread: one that is slow or raises keeps neither the disk nor another sink waiting.

    Args:
        names: ``module:class``. The class is called with the run's name, what it makes is called with each line.
    """

    def __init__(self, names: Sequence[str], run: str) -> None:
        self._sinks = [_background(name, run) for name in names]

    @property
    def dropped(self) -> int:
        """Count the lines that a sink was too slow for, or failed on."""
        return sum(sink.dropped for sink in self._sinks)

    def put(self, line: Line) -> None:
        for sink in self._sinks:
            sink.put(line)


def _background(name: str, run: str) -> Background[Line]:
    return Background(_Sink(name, run), MAX_WAITING, Guard(logger, f"the mismatch does not all reach {name}"))


class _Sink:
    """Makes the sink in its thread, at the first line."""

    def __init__(self, name: str, run: str) -> None:
        self._name, self._run = name, run
        self._sink: Callable[[Line], None] | None = None

    def __call__(self, line: Line) -> None:
        if self._sink is None:
            self._sink = _make(self._name, self._run)
        self._sink(line)


def _make(name: str, run: str) -> Callable[[Line], None]:
    module, _, attribute = name.partition(":")
    sink: Callable[[Line], None] = getattr(importlib.import_module(module), attribute)(run)
    return sink
