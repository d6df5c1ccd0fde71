"""Reads what a line of a run record holds: a step's metrics, its coverage, its alerts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, TypeGuard

Line = dict[str, Any]


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


def parse_line(text: str | bytes) -> Line | None:
    """Return the line's object; None for one that is cut off or has no step."""
    try:
        content = json.loads(text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text)
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None


def metrics_of(line: Line) -> dict[str, float]:
    metrics = line.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


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
    return int(value) if _is_number(value) else None


def alerts_of(line: Line) -> tuple[StandingAlert, ...]:
    contents = line.get("alerts")
    return tuple(
        _alert(content, line["step"])
        for content in (contents if isinstance(contents, list) else [])
        if isinstance(content, dict)
    )


def _alert(content: dict[str, Any], step: int) -> StandingAlert:
    value, threshold, since = (content.get(key) for key in ("value", "threshold", "since"))
    return StandingAlert(
        name=str(content.get("name", "?")),
        value=float(value) if _is_number(value) else math.nan,
        threshold=float(threshold) if _is_number(threshold) else math.nan,
        since=since if isinstance(since, int) else step,
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
