"""Alerts on a run's mismatch: which figures are too large, and since when."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp16_patch.mismatch.diagnosis.judgement import RULE, RULES, TREND, Rule, Thresholds

TREND_POINTS = 5
"""A trend compares medians of so many measured steps, so that one odd step is none."""


@dataclass(frozen=True)
class Alert:
    """A metric beyond its threshold.

    Attributes:
        value: the latest measured one; of k1 its magnitude, of the trend the ratio of the medians.
        since_step: the first of the consecutive steps beyond the threshold.
    """

    name: str
    metric: str
    value: float
    threshold: float
    since_step: int

    @property
    def message(self) -> str:
        """One sentence: metric, value, threshold, and since which step."""
        return f"{self.name}: {RULE[self.name].says(self.value, self.threshold)}, since step {self.since_step}"

    def as_dict(self) -> dict[str, Any]:
        """Return what the step's line of the record says of it."""
        return {"name": self.name, "value": self.value, "threshold": self.threshold, "since": self.since_step}


class Alerts:
    """The alerts of one run.

    An alert fires after ``after`` consecutive measured steps beyond its threshold (at the first one for non-finite
    tokens), and clears after as many well within it. A step that lacks the metric, or has NaN, counts as none.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self._watches = [
            _Watch(rule, threshold, 1 if rule.at_once else thresholds.after, thresholds.after)
            for rule in RULES
            if (threshold := rule.threshold(thresholds)) is not None
        ]
        self._trend = _Trend(thresholds.doubling_steps or 0)
        self._new: list[Alert] = []

    @property
    def new(self) -> list[Alert]:
        """Return the alerts that fired at the latest step."""
        return list(self._new)

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Take in a step's metrics, named as ``MismatchStats.metrics`` names them; return the alerts now standing."""
        values = {**metrics, TREND: self._trend.update(step, metrics.get("mismatch/mean_abs", math.nan))}
        stood = {watch.rule.name for watch in self._watches if watch.alert}
        for watch in self._watches:
            watch.update(step, watch.rule.value(values))
        standing = [watch.alert for watch in self._watches if watch.alert]
        self._new = [alert for alert in standing if alert.name not in stood]
        return standing


@dataclass
class _Watch:
    """One rule's hysteresis: for how many steps in a row the value has been beyond, or well within, the threshold."""

    rule: Rule
    threshold: float
    fires_after: int
    clears_after: int
    alert: Alert | None = None
    _beyond: int = 0
    _within: int = 0
    _since: int = 0

    def update(self, step: int, value: float) -> None:
        if math.isnan(value):
            return
        self._beyond = self._beyond + 1 if self.rule.is_beyond(value, self.threshold) else 0
        self._within = self._within + 1 if self.rule.is_well_within(value, self.threshold) else 0
        self._since = step if self._beyond == 1 else self._since
        if self.alert is None and self._beyond >= self.fires_after:
            self.alert = self._standing(value, self._since)
        elif self.alert is not None:
            self.alert = None if self._within >= self.clears_after else self._standing(value, self.alert.since_step)

    def _standing(self, value: float, since: int) -> Alert:
        return Alert(self.rule.name, self.rule.metric, value, self.threshold, since)


class _Trend:
    """The median of the latest values over the median of the latest values from at least ``span`` steps before."""

    def __init__(self, span: int) -> None:
        self._span = span
        self._earlier: deque[float] = deque(maxlen=TREND_POINTS)
        self._later: deque[tuple[int, float]] = deque()

    def update(self, step: int, value: float) -> float:
        """Return the ratio; NaN without a value, before there are enough of them, or where there was no gap before."""
        if not self._span or not math.isfinite(value):
            return math.nan
        self._later.append((step, value))
        while self._later[0][0] <= step - self._span:
            self._earlier.append(self._later.popleft()[1])
        latest = [value for _, value in self._later][-TREND_POINTS:]
        if min(len(latest), len(self._earlier)) < min(TREND_POINTS, self._span):
            return math.nan
        before = statistics.median(self._earlier)
        return statistics.median(latest) / before if before > 0 else math.nan
