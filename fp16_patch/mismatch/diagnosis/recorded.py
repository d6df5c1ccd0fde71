"""Detectors of what is wrong with the log-probs on record themselves: missing, coarse, or none at all."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fp16_patch.mismatch.diagnosis.evidence import Evidence, mantissa_bits
from fp16_patch.mismatch.diagnosis.rounding import MIN_TOKENS
from fp16_patch.mismatch.diagnosis.sentences import Sentences, number
from fp16_patch.mismatch.statistics.summary import MismatchStats

MAX_CHANCE = 0.01
MIN_GRID_BINS = 8
"""Log-probs over fewer bins of probability may lie on a grid by how they were chosen."""

EXPLAINED = 3.0
"""A gap of more times what the record's rounding makes has another reason besides."""


def not_log_probs(evidence: Evidence) -> Sentences:
    stats = evidence.stats
    counts = {"sampler": stats.sampler_positive_count, "learner": stats.learner_positive_count}
    found = [
        f"The {side}'s log-prob is above 0 for {count} of {stats.tokens} tokens ({count / stats.tokens:.2%}), and not "
        "by rounding."
        for side, count in counts.items()
        if count
    ]
    return (*found, "So these are no probabilities, and no figure of them says anything.") if found else ()


def nonfinite_sampler(evidence: Evidence) -> Sentences:
    stats = evidence.stats
    sentences = _nonfinite("sampler", stats.nonfinite_sampler, "learner", stats.nonfinite_learner, stats.tokens)
    if stats.nonfinite_sampler == stats.nonfinite_certain:
        return ()
    certain = f"It is NaN where the learner is certain of the token for {stats.nonfinite_certain} of them."
    return (*sentences, *([certain] if stats.nonfinite_certain else []))


def nonfinite_learner(evidence: Evidence) -> Sentences:
    stats = evidence.stats
    return _nonfinite("learner", stats.nonfinite_learner, "sampler", stats.nonfinite_sampler, stats.tokens)


def _nonfinite(side: str, count: int, other: str, other_count: int, tokens: int) -> Sentences:
    if not count:
        return ()
    return (
        f"The {side}'s log-prob is NaN or infinite for {count} of {tokens} tokens ({count / tokens:.2%}), "
        f"the {other}'s for {other_count}.",
        "All other figures are of the tokens where both are finite.",
    )


def certain_tokens(evidence: Evidence) -> Sentences:
    """Say that the sampler lacks log-probs of certain tokens only."""
    stats = evidence.stats
    count = stats.nonfinite_certain
    if not count or count != stats.nonfinite_sampler:
        return ()
    share = _certain_share(stats)
    by_chance = f"{share:.0%} of all tokens are as certain: {count} are too few to rule out chance."
    return (
        f"The sampler's log-prob is NaN or null for {count} of {stats.tokens} tokens ({count / stats.tokens:.2%}), and "
        "to each of them the learner gives a probability of 0.999 or more.",
        "Samplers are known to leave out, or fail to compute, the log-prob of a token that is certain; it is 0, and so "
        "is the token's gap. No alert counts these.",
        *([by_chance] if share**count > MAX_CHANCE else []),
    )


def _certain_share(stats: MismatchStats) -> float:
    certain = MismatchStats.probability_edges()[:-1] > 0.999 - 1e-9
    counts = stats.joint_probability().sum(0)
    return float(counts[certain].sum() / counts.sum().clamp(min=1))


def coarse_record(evidence: Evidence) -> Sentences:
    """Say that a side's log-probs were rounded to a coarser dtype after they had been computed."""
    sides = coarse_sides(evidence)
    if not sides:
        return ()
    return (
        *(
            f"All {getattr(evidence.stats, f'{side}_nonzero_count')} log-probs of the {side} that are not 0 lie on "
            f"{dtype}'s grid: they were rounded to it when they were computed, sent or stored."
            for side, dtype in sides.items()
        ),
        f"At these log-probs that alone makes mean |d| up to about {number(_rounding_of_record(evidence, sides))}; it "
        f"is {number(evidence.total.mean_abs)}. What the engines themselves make of it cannot be seen below that.",
    )


def coarse_sides(evidence: Evidence) -> dict[str, str]:
    """Return side → the coarsest dtype that holds all of its log-probs exactly, as far as there are enough of them."""
    stats, joint = evidence.stats, evidence.stats.joint_probability()
    found = {}
    for side, counts in (("sampler", joint.sum(1)), ("learner", joint.sum(0))):
        nonzero = getattr(stats, f"{side}_nonzero_count")
        if nonzero >= MIN_TOKENS and int(counts.count_nonzero()) >= MIN_GRID_BINS:
            on_grid = (name for name in ("bfloat16", "float16") if getattr(stats, f"{side}_{name}_count") == nonzero)
            found[side] = next(on_grid, None)
    return {side: dtype for side, dtype in found.items() if dtype is not None}


def _rounding_of_record(evidence: Evidence, sides: Mapping[str, str]) -> float:
    """Mean |error| of a rounding: a quarter of the spacing, which is 2^-bits of the power of 2 below the value."""
    stats = evidence.stats
    errors = [
        -getattr(stats, f"{side}_log_prob_sum")
        / stats.weighed_tokens
        * math.log(2)
        * 2.0 ** -((mantissa_bits(dtype) or 0) + 2)
        for side, dtype in sides.items()
    ]
    return math.hypot(*errors)


def record_explains(evidence: Evidence) -> bool:
    return evidence.total.mean_abs <= EXPLAINED * _rounding_of_record(evidence, coarse_sides(evidence))
