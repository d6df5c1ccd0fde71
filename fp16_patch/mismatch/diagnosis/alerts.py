"""Alerts on a run's mismatch: which thresholds it is beyond, and since when.

Sources of the thresholds:
    k1, ess, chi2          verl's example alarms of its rollout correction: |kl| > 0.1, ESS < 0.3, chi2_token > 1
    token_mult_prob_error  NeMo-RL's guide to GRPO: above 1.05, investigate
    prob_diff              arXiv 2510.26788: before a collapse π − μ goes to ±1 on some tokens
    doubling               arXiv 2602.01826: the gap grows with training, so its trend says more than its size
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLEARED_SHARE = 0.9
"""A metric is well within its threshold where it is at most this share of it; one that must not be below, where the
threshold is at most this share of the metric."""

DOUBLED = 2.0
TREND_POINTS = 5
"""A trend compares medians of so many measured steps, so that one odd step is none."""


@dataclass(frozen=True)
class Thresholds:
    """Where alerts fire; None or 0 disables one. Non-finite log-probs always fire.

    Attributes:
        k1: |k1| above, nats.
        ess: effective sample size, a share of the tokens, below.
        chi2: χ² divergence of the tokens' ratios above. Not the sequences': theirs grows with their length.
        token_mult_prob_error: mean exp|d| above.
        prob_diff: max |Δp| of a token above.
        doubling_steps: mean |d| is twice what it was so many steps ago.
        after: consecutive measured steps beyond a threshold before it fires, and well within it before it clears.
    """

    k1: float | None = 0.1
    ess: float | None = 0.3
    chi2: float | None = 1.0
    token_mult_prob_error: float | None = 1.05
    prob_diff: float | None = 0.95
    doubling_steps: int | None = 100
    after: int = 2


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
        sentence = _SENTENCES[self.name]
        says = sentence.format(metric=self.metric, value=f"{self.value:.3g}", limit=f"{self.threshold:g}")
        return f"{self.name}: {says}, since step {self.since_step}"

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
            for rule in _RULES
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
        values = {**metrics, _TREND: self._trend.update(step, metrics.get("mismatch/mean_abs", math.nan))}
        stood = {watch.rule.name for watch in self._watches if watch.alert}
        for watch in self._watches:
            watch.update(step, watch.rule.value(values))
        standing = [watch.alert for watch in self._watches if watch.alert]
        self._new = [alert for alert in standing if alert.name not in stood]
        return standing


@dataclass(frozen=True)
class _Rule:
    """What one alert watches.

    Attributes:
        setting: the field of ``Thresholds`` that holds the threshold and disables the alert; None: nothing does.
        fixed: the threshold, where it is no setting's value.
        below: the metric must not be below the threshold, instead of above.
        at_once: fires at the first step beyond the threshold.
        reads: what is compared, if not the metric itself.
    """

    name: str
    metric: str
    setting: str | None
    sentence: str = "{metric} is {value}, above {limit}"
    fixed: float | None = None
    below: bool = False
    at_once: bool = False
    reads: str | None = None

    def threshold(self, thresholds: Thresholds) -> float | None:
        """Return the alert's threshold; None where the alert is disabled."""
        setting = None if self.setting is None else getattr(thresholds, self.setting)
        if self.setting is not None and not setting:
            return None
        return setting if self.fixed is None else self.fixed

    def value(self, values: Mapping[str, float]) -> float:
        return abs(values.get(self.reads or self.metric, math.nan))

    def is_beyond(self, value: float, threshold: float) -> bool:
        return value < threshold if self.below else value > threshold

    def is_well_within(self, value: float, threshold: float) -> bool:
        return threshold <= CLEARED_SHARE * value if self.below else value <= CLEARED_SHARE * threshold


_TREND = "mean_abs now ÷ earlier"
_IS_NONZERO = "{metric} is {value}, and may only be 0"
_IS_OUTSIDE = "|{metric}| is {value}, above {limit}"
_IS_BELOW = "{metric}, a share of the tokens, is {value}, below {limit}"
_HAS_GROWN = "{metric} is {value} times what it was (alert_doubling_steps before), above {limit}"

_RULES = (
    _Rule("nonfinite", "mismatch/nonfinite_tokens", None, _IS_NONZERO, fixed=0.0, at_once=True),
    _Rule("k1", "mismatch/k1", "k1", _IS_OUTSIDE),
    _Rule("ess", "mismatch/ess", "ess", _IS_BELOW, below=True),
    _Rule("chi2_token", "mismatch/chi2_token", "chi2"),
    _Rule("token_mult_prob_error", "mismatch/token_mult_prob_error", "token_mult_prob_error"),
    _Rule("prob_diff", "mismatch/prob_max_abs", "prob_diff"),
    _Rule("doubling", "mismatch/mean_abs", "doubling_steps", _HAS_GROWN, fixed=DOUBLED, reads=_TREND),
)
_SENTENCES = {rule.name: rule.sentence for rule in _RULES}


@dataclass
class _Watch:
    """One rule's hysteresis: for how many steps in a row the value has been beyond, or well within, the threshold."""

    rule: _Rule
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
