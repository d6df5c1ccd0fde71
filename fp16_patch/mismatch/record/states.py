"""Adds up the states of a run's steps, one line at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fp16_patch.mismatch.record.lines import Line
from fp16_patch.mismatch.statistics.by_lag import MOST_LAG
from fp16_patch.mismatch.statistics.summary import MERGED_AT_ONCE, MismatchStats, WorstToken
from fp16_patch.untrusted.text import quoted

WORST_TOKENS = 16
LISTED_PROBLEMS = 5

State = dict[str, Any]
_NOTHING: State = MismatchStats.empty().to_dict()
Worst = list[tuple[int, WorstToken]]


class States:
    """What the states of all lines come to.

    Args:
        keep_every: of so many steps in a row the first one's state is kept.

    Attributes:
        kept: step → its state. ``fresh``: of these steps, those whose lags are known, and their state at lag 0, which
            may have no tokens. ``worst``: see ``worst_of``.
        noise_floor: None where it was not measured.
    """

    def __init__(self, keep_every: int) -> None:
        self.kept: dict[int, MismatchStats] = {}
        self.fresh: dict[int, MismatchStats] = {}
        self.worst: Worst = []
        self.noise_floor: MismatchStats | None = None
        self._keep_every, self._lines = keep_every, 0
        self._total = _Sum(self._take_worst, self._leave_out)
        self._of_lag: dict[int, _Sum] = {}
        self._problems: list[str] = []
        self._left_out = 0

    def add(self, line: Line) -> None:
        """Add the line's state; one that cannot be read is left out."""
        step, keep = line["step"], self._lines % self._keep_every == 0
        self._lines += 1
        try:
            state = _object(line.get("state"))
            floor = MismatchStats.from_dict(_object(line["noise_floor"])) if line.get("noise_floor") else None
            by_lag = _by_lag(line.get("by_lag"))
            kept = MismatchStats.from_dict(state) if keep else None
            fresh = MismatchStats.from_dict(by_lag.get(0, _NOTHING)) if keep and by_lag else None
        except ValueError as problem:
            self._leave_out(step, problem)
            return
        self.kept |= {} if kept is None else {step: kept}
        self.fresh |= {} if fresh is None else {step: fresh}
        if floor is not None:
            self.noise_floor = floor if self.noise_floor is None else self.noise_floor + floor
        self._total.add(step, state)
        for lag, of_lag in by_lag.items():
            self._of_lag.setdefault(lag, _Sum(_ignore, _ignore)).add(step, of_lag)

    def total(self) -> MismatchStats:
        return self._total.total()

    def by_lag(self) -> dict[int, MismatchStats]:
        """Return the mismatch of all steps by lag, as far as lags are known, and as it can be read."""
        return {lag: self._of_lag[lag].total() for lag in sorted(self._of_lag)}

    def notes(self, name: str) -> list[str]:
        """Say which steps are not in the totals; ``name`` is the file's."""
        more = self._left_out - len(self._problems)
        listed = [f"{name}: {problem}" for problem in self._problems]
        return listed + ([f"{name}: {more} more steps are not in the totals"] if more else [])

    def _take_worst(self, states: Iterable[tuple[int, State]]) -> None:
        for step, state in states:
            rows = state.get("worst") or [[0.0, 0.0]]
            largest = max(abs(row[1] - row[0]) for row in rows)
            if len(self.worst) < WORST_TOKENS or largest > abs(self.worst[-1][1].d):
                tokens = MismatchStats.from_dict(state).worst_tokens()
                self.worst = worst_of([*self.worst, *((step, token) for token in tokens)])

    def _leave_out(self, step: int, problem: ValueError) -> None:
        self._left_out += 1
        if len(self._problems) < LISTED_PROBLEMS:
            self._problems.append(f"step {step} is not in the totals: {quoted(problem)}")


class _Sum:
    """Adds up states, many at once.

    Args:
        added: is told which states were added, and of which steps. ``left_out``: which could not be, and why.
    """

    def __init__(
        self, added: Callable[[Iterable[tuple[int, State]]], None], left_out: Callable[[int, ValueError], None]
    ) -> None:
        self._added, self._left_out = added, left_out
        self._waiting: list[tuple[int, State]] = []
        self._total = MismatchStats.empty()

    def add(self, step: int, state: State) -> None:
        self._waiting.append((step, state))
        if len(self._waiting) == MERGED_AT_ONCE:
            self._add_up()

    def total(self) -> MismatchStats:
        self._add_up()
        return self._total

    def _add_up(self) -> None:
        """Add what waits to the total: all of it at once, or one by one where one of them is damaged."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        try:
            self._total += MismatchStats.sum_of_dicts([state for _, state in waiting])
        except ValueError:
            waiting = [entry for entry in waiting if self._adds(*entry)]
        self._added(waiting)

    def _adds(self, step: int, state: State) -> bool:
        try:
            self._total += MismatchStats.from_dict(state)
        except ValueError as problem:
            self._left_out(step, problem)
            return False
        return True


def _ignore(*told: object) -> None:
    del told


def _by_lag(content: object) -> dict[int, State]:
    """Return lag → state of a line; nothing where lags are not known.

    Raises:
        ValueError: it holds something else.
    """
    if content is None:
        return {}
    table = _object(content)
    known = {str(lag): lag for lag in range(MOST_LAG + 1)}
    if unknown := table.keys() - known.keys():
        raise ValueError(f"{min(unknown)} is no lag")
    return {known[lag]: _object(state) for lag, state in table.items()}


def worst_of(tokens: Iterable[tuple[int, WorstToken]]) -> Worst:
    """Return the (step, token) of the largest |d|, largest first."""
    return sorted(tokens, key=lambda pair: -abs(pair[1].d))[:WORST_TOKENS]


def _object(content: object) -> State:
    if not isinstance(content, dict):
        raise ValueError("it has no state" if content is None else "its state is no object")
    return content
