"""Declares each single number of a state once: what it is of, and how two of them merge.

``d = log π_learner − log μ_sampler``, ``r = exp(d)``, ``w = min(r, 2)``, ``D = Σ_t d``, ``p = exp(log-prob)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Generic, TypeVar

Number = TypeVar("Number", int, float)


class Part(Enum):
    """Where in the vector a figure lies, in this order: added up first, then the lesser of two, then the greater."""

    TOKEN_COUNTS = "tokens that are beyond a threshold"
    TOKEN_SUMS = "over finite tokens"
    TOKENS_OF_SEQUENCES = "tokens, counted by sequence"
    SEQUENCE_SUMS = "over finite sequences"
    SEQUENCE_COUNTS = "sequences"
    LEAST = "the lesser; +∞ of nothing"
    GREATEST = "the greater; −∞ of nothing"
    MAGNITUDES = "the greater, never negative; 0 of nothing"


class Figure(Generic[Number]):
    """One declared figure; read from a summary, it is its value there."""

    def __init__(self, kind: Callable[[float], Number], part: Part) -> None:
        self._kind: Callable[[float], Number] = kind
        self.part = part

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, figures: Figures, owner: type | None = None) -> Number:
        return self._kind(figures._scalars[self.name])


def _count(part: Part) -> Figure[int]:
    return Figure(int, part)


def _number(part: Part) -> Figure[float]:
    return Figure(float, part)


class Figures(ABC):
    """Every figure, as an attribute. Within a part, the vector has them in the order in which they stand here.

    ``weighed_tokens`` and ``weighed_sequences`` are those finite ones of which more is known than version 1 of the
    state had: all, unless such a state was merged in.
    """

    tail_1e_2_count = _count(Part.TOKEN_COUNTS)
    tail_1e_1_count = _count(Part.TOKEN_COUNTS)
    tail_1_count = _count(Part.TOKEN_COUNTS)
    ratio_above_2_count = _count(Part.TOKEN_COUNTS)
    ratio_below_half_count = _count(Part.TOKEN_COUNTS)
    ratio_above_5_count = _count(Part.TOKEN_COUNTS)
    # Log-probs above 0 by more than rounding makes of them; those that are not 0, and of these, those that a coarser
    # dtype holds exactly.
    sampler_positive_count = _count(Part.TOKEN_COUNTS)
    learner_positive_count = _count(Part.TOKEN_COUNTS)
    sampler_nonzero_count = _count(Part.TOKEN_COUNTS)
    learner_nonzero_count = _count(Part.TOKEN_COUNTS)
    sampler_bfloat16_count = _count(Part.TOKEN_COUNTS)
    learner_bfloat16_count = _count(Part.TOKEN_COUNTS)
    sampler_float16_count = _count(Part.TOKEN_COUNTS)
    learner_float16_count = _count(Part.TOKEN_COUNTS)

    # Of d; of exp(d) − 1 − d and exp(−d) − 1 + d (k3); of log cosh(d/2).
    d_sum = _number(Part.TOKEN_SUMS)
    d_abs_sum = _number(Part.TOKEN_SUMS)
    d_square_sum = _number(Part.TOKEN_SUMS)
    k3_sum = _number(Part.TOKEN_SUMS)
    k3_reverse_sum = _number(Part.TOKEN_SUMS)
    js_sum = _number(Part.TOKEN_SUMS)
    # Of exp|d| − 1; of r − 1, its exponent capped, and bounded; of w − 1.
    expm1_abs_sum = _number(Part.TOKEN_SUMS)
    capped_expm1_sum = _number(Part.TOKEN_SUMS)
    expm1_sum = _number(Part.TOKEN_SUMS)
    expm1_square_sum = _number(Part.TOKEN_SUMS)
    truncated_expm1_sum = _number(Part.TOKEN_SUMS)
    truncated_expm1_square_sum = _number(Part.TOKEN_SUMS)
    sampler_log_prob_sum = _number(Part.TOKEN_SUMS)
    learner_log_prob_sum = _number(Part.TOKEN_SUMS)
    sampler_log_prob_square_sum = _number(Part.TOKEN_SUMS)
    learner_log_prob_square_sum = _number(Part.TOKEN_SUMS)
    log_prob_product_sum = _number(Part.TOKEN_SUMS)
    # Of p; of p_learner − p_sampler.
    sampler_prob_sum = _number(Part.TOKEN_SUMS)
    learner_prob_sum = _number(Part.TOKEN_SUMS)
    sampler_prob_square_sum = _number(Part.TOKEN_SUMS)
    learner_prob_square_sum = _number(Part.TOKEN_SUMS)
    prob_product_sum = _number(Part.TOKEN_SUMS)
    prob_abs_sum = _number(Part.TOKEN_SUMS)
    prob_difference_square_sum = _number(Part.TOKEN_SUMS)

    tokens = _count(Part.TOKENS_OF_SEQUENCES)
    nonfinite_sampler = _count(Part.TOKENS_OF_SEQUENCES)
    nonfinite_learner = _count(Part.TOKENS_OF_SEQUENCES)
    nonfinite_tokens = _count(Part.TOKENS_OF_SEQUENCES)
    # The sampler's is NaN, and the learner is certain of the token.
    nonfinite_certain = _count(Part.TOKENS_OF_SEQUENCES)
    weighed_tokens = _count(Part.TOKENS_OF_SEQUENCES)

    # Of D; of exp(D) − 1; of a sequence's mean of w, less 1; of verl's perplexities.
    sequence_sum = _number(Part.SEQUENCE_SUMS)
    sequence_abs_sum = _number(Part.SEQUENCE_SUMS)
    sequence_square_sum = _number(Part.SEQUENCE_SUMS)
    sequence_expm1_sum = _number(Part.SEQUENCE_SUMS)
    sequence_expm1_square_sum = _number(Part.SEQUENCE_SUMS)
    sequence_weight_sum = _number(Part.SEQUENCE_SUMS)
    sequence_weight_square_sum = _number(Part.SEQUENCE_SUMS)
    sampler_log_ppl_sum = _number(Part.SEQUENCE_SUMS)
    learner_log_ppl_sum = _number(Part.SEQUENCE_SUMS)
    sampler_ppl_sum = _number(Part.SEQUENCE_SUMS)
    learner_ppl_sum = _number(Part.SEQUENCE_SUMS)
    log_ppl_diff_sum = _number(Part.SEQUENCE_SUMS)
    log_ppl_diff_abs_sum = _number(Part.SEQUENCE_SUMS)
    ppl_ratio_expm1_sum = _number(Part.SEQUENCE_SUMS)

    sequences = _count(Part.SEQUENCE_COUNTS)
    nonfinite_sequences = _count(Part.SEQUENCE_COUNTS)
    weighed_sequences = _count(Part.SEQUENCE_COUNTS)
    sequence_ratio_outside_count = _count(Part.SEQUENCE_COUNTS)
    sequence_weight_above_2_count = _count(Part.SEQUENCE_COUNTS)
    sequence_weight_below_half_count = _count(Part.SEQUENCE_COUNTS)

    d_min = _number(Part.LEAST)
    log_ppl_diff_min = _number(Part.LEAST)
    sequence_weight_min = _number(Part.LEAST)

    d_max = _number(Part.GREATEST)
    log_ppl_diff_max = _number(Part.GREATEST)
    sequence_weight_max = _number(Part.GREATEST)

    prob_abs_max = _number(Part.MAGNITUDES)
    sequence_abs_max = _number(Part.MAGNITUDES)

    @property
    @abstractmethod
    def _scalars(self) -> Mapping[str, float]:
        """The values, by name."""

    @property
    def finite_tokens(self) -> int:
        """Tokens that enter the moments."""
        return self.tokens - self.nonfinite_tokens

    @property
    def finite_sequences(self) -> int:
        """Sequences that enter the sequence sums."""
        return self.sequences - self.nonfinite_sequences

    @property
    def d_abs_max(self) -> float:
        """max |d|; −inf with no finite token."""
        return max(-self.d_min, self.d_max)


def names_of(*parts: Part) -> tuple[str, ...]:
    """Return the names of these parts' figures, part after part, in the order of the vector."""
    declared = [figure for figure in vars(Figures).values() if isinstance(figure, Figure)]
    return tuple(figure.name for part in parts for figure in declared if figure.part is part)
