"""Follows when, and by which start of the trainer, the steps of a run were recorded."""

from __future__ import annotations

from fp16_patch.mismatch.record.lines import Line, attempt_of, time_of

LONGEST_STEP_S = 30 * 86400.0
"""Where a step seems to take longer, or less than nothing, somebody has set the clock."""

MOST_STARTS = 1000


class Progress:
    """What lines say beside figures, in the order of their steps.

    Attributes:
        wall_s: seconds from the first step's end to the last one's, without those by which the clock was set; None
            where no line has a time.
        starts: start of the trainer → the first step of it that is left, of at most ``MOST_STARTS`` starts.
    """

    def __init__(self) -> None:
        self.wall_s: float | None = None
        self.starts: dict[str, int] = {}
        self._time: float | None = None

    def add(self, line: Line) -> None:
        self._pass(time_of(line))
        attempt = attempt_of(line)
        if attempt is not None and len(self.starts) < MOST_STARTS:
            self.starts.setdefault(attempt, line["step"])

    def _pass(self, time: float | None) -> None:
        if time is None:
            return
        passed = 0.0 if self._time is None else time - self._time
        self.wall_s = (self.wall_s or 0.0) + (passed if 0 < passed <= LONGEST_STEP_S else 0.0)
        self._time = time
