"""Keeps exceptions of ours from whoever called us, or tells them from the caller's own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from fp16_patch.plan.errors import Fp16PatchError

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


class OurPart:
    """Code of ours that a framework calls: it stops nothing where the plan only observes, else its errors say whose.

    An `Fp16PatchError` is meant for the user, and is raised as it is in either case.

    Args:
        what: the part, for the message of an error, after "in".
        observes: whether the plan in force changes nothing. Asked at a failure.
    """

    def __init__(self, logger: logging.Logger, what: str, observes: Callable[[], bool]) -> None:
        self.what = what
        self._observes = observes
        self._guard = Guard(logger, f"fp16_patch failed in {what}; the run goes on without it, as FP16_PATCH=observe")

    def run(self, action: Callable[[], Result]) -> Result | None:
        """Return the action's result; None if it failed and the plan observes.

        Raises:
            Exception: the action's, with a note that says whose it is, if the plan decides something.
        """
        try:
            return action()
        except Exception as failure:
            if not self.contains(failure):
                raise
            return None

    def contains(self, failure: Exception) -> bool:
        """Warn of a failure where the plan observes, else note whose it is; True if the framework is to go on."""
        if isinstance(failure, Fp16PatchError):
            return False
        if self._observes():
            self._guard.warn(f"{type(failure).__name__}: {failure}")
            return True
        # Looked up and not imported: the package's face names what stands above this.
        release = sys.modules["fp16_patch"].__version__
        add_note(
            failure,
            f"This was raised in fp16_patch {release}, in {self.what}, and not in the framework's own code. "
            "If it says nothing that you can mend, please report it to fp16_patch, with this traceback. "
            "FP16_PATCH=off runs without fp16_patch",
        )
        return False


def add_note(failure: Exception, note: str) -> None:
    """Add a line below an exception's message; before Python 3.11, where there are none, as its first cause."""
    if hasattr(failure, "add_note"):
        failure.add_note(note)
        return
    first: BaseException = failure
    seen = {id(first)}
    while (before := first.__cause__ or first.__context__) is not None and id(before) not in seen:
        seen.add(id(before))
        first = before
    first.__cause__ = Note(note)


class Note(Exception):
    """Stands for a note of an exception on Python 3.10."""
