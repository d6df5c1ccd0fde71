"""Turns exceptions into one warning: whatever happens to the monitor, its caller goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Guard:
    """Runs actions; the first that fails is one warning, later ones are silent.

    Args:
        warning: the sentence that precedes the failure.
    """

    def __init__(self, logger: logging.Logger, warning: str) -> None:
        self._logger = logger
        self._warning = warning
        self._warned = False

    def run(self, action: Callable[[], Result]) -> Result | None:
        """Return the action's result; None if it raised."""
        try:
            return action()
        except Exception as failure:
            self.warn(failure)
            return None

    def warn(self, failure: object) -> None:
        if not self._warned:
            self._warned = True
            self._logger.warning("%s: %s", self._warning, failure)
