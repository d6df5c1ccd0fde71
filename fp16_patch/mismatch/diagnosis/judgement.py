"""Decides which figures of a mismatch are too large: the one decision that alerts and the diagnosis both ask.

Sources of the thresholds:
    k1, ess, chi2          verl's example alarms of its rollout correction: |kl| > 0.1, ESS < 0.3, chi2_token > 1
    token_mult_prob_error  NeMo-RL's guide to GRPO: above 1.05, investigate
    prob_diff              arXiv 2510.26788: before a collapse π − μ goes to ±1 on some tokens
    doubling               arXiv 2602.01826: the gap grows with training, so its trend says more than its size
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

CLEARED_SHARE = 0.9
"""A metric is well within its threshold where it is at most this share of it; one that must not be below, where the
threshold is at most this share of the metric."""

DOUBLED = 2.0
TREND = "mean_abs now ÷ earlier"
SETTING = "alert_"


@dataclass(frozen=True)
class Thresholds:
    """Where alerts fire; None or 0 disables one. What is no number, or no log-prob, always fires.

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

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any]) -> Thresholds:
        """Return those of a plan's settings, `alert_k1` and so on; the default where the plan says nothing."""
        settings = {field.name: plan.get(SETTING + field.name) for field in fields(cls)}
        numbers: dict[str, Any] = {name: value for name, value in settings.items() if isinstance(value, int | float)}
        return cls(**numbers)


@dataclass(frozen=True)
class Rule:
    """What is judged of a figure.

    Attributes:
        setting: the field of ``Thresholds`` that holds the threshold and disables the rule; None: nothing does.
        fixed: the threshold, where it is no setting's value.
        below: the metric must not be below the threshold, instead of above.
        at_once: an alert fires at the first step beyond the threshold.
        reads: what is compared, if not the metric itself.
        less: a metric that is taken off: what is harmless of it.
        of_size: the figure says how large the gap is, over any set of tokens.
    """

    name: str
    metric: str
    setting: str | None
    sentence: str = "{metric} is {value}, above {limit}"
    fixed: float | None = None
    below: bool = False
    at_once: bool = False
    reads: str | None = None
    less: str | None = None
    of_size: bool = True

    def threshold(self, thresholds: Thresholds) -> float | None:
        """Return the rule's threshold; None where the rule is disabled."""
        setting = None if self.setting is None else getattr(thresholds, self.setting)
        if self.setting is not None and not setting:
            return None
        return setting if self.fixed is None else self.fixed

    def value(self, values: Mapping[str, float]) -> float:
        harmless = values.get(self.less, 0.0) if self.less else 0.0
        return abs(values.get(self.reads or self.metric, math.nan) - harmless)

    def is_beyond(self, value: float, threshold: float) -> bool:
        return value < threshold if self.below else value > threshold

    def is_well_within(self, value: float, threshold: float) -> bool:
        return threshold <= CLEARED_SHARE * value if self.below else value <= CLEARED_SHARE * threshold

    def says(self, value: float, threshold: float) -> str:
        """Say in one clause what is beyond which threshold."""
        return self.sentence.format(metric=self.metric, value=f"{value:.3g}", limit=f"{threshold:g}")


_IS_NONZERO = "{metric} is {value}, and may only be 0"
_IS_NOT_CERTAIN = "{metric} is {value} apart from certain tokens, and may only be 0"
_IS_OUTSIDE = "|{metric}| is {value}, above {limit}"
_IS_BELOW = "{metric}, a share of the tokens, is {value}, below {limit}"
_HAS_GROWN = "{metric} is {value} times what it was (alert_doubling_steps before), above {limit}"


def _never(name: str, metric: str, sentence: str = _IS_NONZERO, less: str | None = None) -> Rule:
    return Rule(name, metric, None, sentence, fixed=0.0, at_once=True, less=less, of_size=False)


RULES = (
    _never("nonfinite", "mismatch/nonfinite_tokens", _IS_NOT_CERTAIN, less="mismatch/nonfinite_certain"),
    _never("positive_sampler", "mismatch/positive_sampler"),
    _never("positive_learner", "mismatch/positive_learner"),
    Rule("k1", "mismatch/k1", "k1", _IS_OUTSIDE),
    Rule("ess", "mismatch/ess", "ess", _IS_BELOW, below=True),
    Rule("chi2_token", "mismatch/chi2_token", "chi2"),
    Rule("token_mult_prob_error", "mismatch/token_mult_prob_error", "token_mult_prob_error"),
    Rule("prob_diff", "mismatch/prob_max_abs", "prob_diff"),
    Rule("doubling", "mismatch/mean_abs", "doubling_steps", _HAS_GROWN, fixed=DOUBLED, reads=TREND, of_size=False),
)
RULE = {rule.name: rule for rule in RULES}


def too_large(metrics: Mapping[str, float], thresholds: Thresholds) -> list[str]:
    """Say which figures of the gap's size are beyond their thresholds, over the tokens that the metrics are of."""
    judged = ((rule, rule.threshold(thresholds), rule.value(metrics)) for rule in RULES if rule.of_size)
    return [
        rule.says(value, threshold)
        for rule, threshold, value in judged
        if threshold is not None and rule.is_beyond(value, threshold)
    ]
