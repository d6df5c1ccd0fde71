"""Keeps the lines of the latest steps, for those who watch a run while it trains."""

from __future__ import annotations

from typing import Any

Line = dict[str, Any]

KEPT_STEPS = 256
BULKY = ("state", "noise_floor", "by_lag")


class History:
    """Keeps lines by step and file, without the statistics in them; a step's later line replaces its former one."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[str, Line]] = {}

    def add(self, name: str, line: Line) -> None:
        lines = self._steps.setdefault(line["step"], {})
        lines[name] = {field: value for field, value in line.items() if field not in BULKY}
        if len(self._steps) > KEPT_STEPS:
            del self._steps[next(iter(self._steps))]

    def line(self, name: str, step: int) -> Line | None:
        return self._steps.get(step, {}).get(name)

    def lines(self, last: int) -> list[Line]:
        """Return those of the last so many steps, in the order in which the steps ended."""
        return [line for step in list(self._steps)[-last:] for line in self._steps[step].values()]

    def newest(self) -> int | None:
        """Return the step that ended last."""
        return next(reversed(self._steps), None)
