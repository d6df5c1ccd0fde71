"""Reads what a line of a run record holds: a step's metrics, its coverage, its alerts."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, TypeGuard

from fp16_patch.untrusted.lines import json_of_line
from fp16_patch.untrusted.reading import Unreadable
from fp16_patch.untrusted.text import quoted

Line = dict[str, Any]

MOST_STEP = 1 << 53
"""Above this, whole numbers are no longer exact where they are drawn."""

LONGEST_NAME = 200
"""Characters of a metric's name."""

MOST_ALERTS = 32
"""Alerts that a line can have."""


@dataclass(frozen=True)
class Coverage:
    """How much of a step was measured; None where it is not known how much there was.

    ``dropped``: reports that were given up.
    """

    tokens: int = 0
    expected_tokens: int | None = None
    ranks: int = 0
    expected_ranks: int | None = None
    dropped: int = 0
    complete: bool = True

    def share(self) -> float:
        """Return the share of the step's tokens that was measured; NaN if it is not known how many there were."""
        return self.tokens / self.expected_tokens if self.expected_tokens else math.nan

    def text(self) -> str:
        ranks, tokens = _of(self.ranks, self.expected_ranks), _of(self.tokens, self.expected_tokens)
        return f"{ranks} ranks, {tokens} tokens"


def _of(count: int, expected: int | None) -> str:
    return str(count) if expected is None else f"{count} of {expected}"


@dataclass(frozen=True)
class StandingAlert:
    """An alert as it stood at a step: the metric was beyond ``threshold`` from step ``since`` on."""

    name: str
    value: float
    threshold: float
    since: int


def parse_line(text: bytes) -> Line | None:
    """Return the line's object; None for one that is cut off or has no step."""
    try:
        content = json_of_line(text)
    except Unreadable:
        return None
    return content if is_line(content) else None


def is_line(content: object) -> TypeGuard[Line]:
    """Return whether it is an object with a step."""
    return isinstance(content, dict) and _is_step(content.get("step"))


def _is_step(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool) and abs(number) < MOST_STEP


def metrics_of(line: Line) -> dict[str, float]:
    """Return name → number, NaN and infinities among them; what is neither is left out."""
    metrics = line.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, float) or (isinstance(value, int) and _is_number(value))
        if len(name) <= LONGEST_NAME
    }


def time_of(line: Line) -> float | None:
    """Return when the line was written, in seconds since 1970; None where it does not say so."""
    time = line.get("time")
    return float(time) if _is_number(time) else None


def attempt_of(line: Line) -> str | None:
    """Return which start of the trainer wrote the line; None where it does not say so."""
    attempt = line.get("attempt")
    return quoted(attempt) if attempt and isinstance(attempt, str | int) else None


def coverage_of(line: Line) -> Coverage | None:
    """Return the line's coverage; None where it was not recorded."""
    content = line.get("coverage")
    if not isinstance(content, dict):
        return None
    return Coverage(
        tokens=_count(content, "tokens") or 0,
        expected_tokens=_count(content, "expected_tokens"),
        ranks=_count(content, "ranks") or 0,
        expected_ranks=_count(content, "expected_ranks"),
        dropped=_count(content, "dropped") or 0,
        complete=content.get("complete") is not False,
    )


def _count(content: dict[str, Any], name: str) -> int | None:
    value = content.get(name)
    return int(value) if _is_number(value) and 0 <= value < MOST_STEP else None


def alerts_of(line: Line) -> tuple[StandingAlert, ...]:
    contents = line.get("alerts")
    return tuple(
        _alert(content, line["step"])
        for content in (contents[:MOST_ALERTS] if isinstance(contents, list) else [])
        if isinstance(content, dict)
    )


def _alert(content: dict[str, Any], step: int) -> StandingAlert:
    name, value, threshold, since = (content.get(key) for key in ("name", "value", "threshold", "since"))
    return StandingAlert(
        name=quoted(name) if isinstance(name, str) else "?",
        value=float(value) if _is_number(value) else math.nan,
        threshold=float(threshold) if _is_number(threshold) else math.nan,
        since=since if _is_step(since) else step,
    )


def _is_number(value: object) -> TypeGuard[float]:
    """Return whether a finite float can hold it: a whole number may be larger."""
    return isinstance(value, int | float) and -sys.float_info.max <= value <= sys.float_info.max
