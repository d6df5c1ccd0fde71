"""Decides how long the driver waits, given how its waiting went before."""

from __future__ import annotations

IMPATIENT_S = 0.1
MAX_PAUSE = 1024


class Patience:
    """Spends one full wait on who never answers; gives who answers late another chance, after ever longer pauses.

    After the n-th full wait in vain, the next is given once an answer has come late, and 2^(n−1)−1 short waits are
    over. Until then waits are ``IMPATIENT_S``. An answer in time restores everything.
    """

    def __init__(self) -> None:
        self._in_vain = 0
        self._pause = 0
        self._late = self._waits_fully = False

    def wait_s(self, full_s: float) -> float:
        """Return how long to wait now."""
        self._waits_fully = self._in_vain == 0 or (self._late and self._pause == 0)
        if self._waits_fully:
            return full_s
        self._pause = max(0, self._pause - 1)
        return min(full_s, IMPATIENT_S)

    def answered(self) -> None:
        """Note that the wait had an end."""
        self._in_vain = 0

    def disappointed(self) -> None:
        """Note that the wait was in vain."""
        if self._waits_fully:
            self._in_vain += 1
            self._pause = min(2 ** (self._in_vain - 1) - 1, MAX_PAUSE)
            self._late = False

    def answered_late(self) -> None:
        """Note that what was waited for in vain has come since."""
        self._late = True
