"""One batch of log-probs becomes the state of its mismatch.

Nothing here depends on what an accelerator has computed, so nothing waits for it, unless ``sequence_ids`` are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp16_patch.mismatch.statistics.bins import (
    BIN_COUNT,
    POSITION_BAND_COUNT,
    PROBABILITY_BIN_COUNT,
    difference_bin,
    probability_bin,
)
from fp16_patch.mismatch.statistics.layout import (
    COUNT_TABLES,
    MAGNITUDE_TABLES,
    NO_TOKEN,
    SUM_TABLES,
    TOKEN_COUNTS,
    TOKEN_SUMS,
    WORST_TOKENS,
    empty_vector,
)
from fp16_patch.mismatch.statistics.ratios import EXPONENT_CAP, ICEPOP_HIGH, TRUNCATION, Ratios
from fp16_patch.mismatch.statistics.sequences import SequenceFigures
from fp16_patch.mismatch.statistics.tokens import Tokens, packed, packed_by_id, padded
from fp16_patch.mismatch.statistics.worst import largest, worst_rows

TAILS = {"tail_1e_2_count": 1e-2, "tail_1e_1_count": 1e-1, "tail_1_count": 1.0}

CPU_CHUNK, OTHER_CHUNK = 1 << 17, 1 << 22
"""Tokens taken at once on a CPU, where more would leave its cache; places elsewhere, where it bounds their memory."""

REUSED_BYTES = 1 << 24
"""About what the intermediates of a chunk take on a CPU."""

_CELLS = PROBABILITY_BIN_COUNT * POSITION_BAND_COUNT
_CELL_SUMS = ("d", "d_abs", "d_square", "tokens")


def state_of(
    sampler: Tensor,
    learner: Tensor,
    mask: Tensor,
    sequence_ids: Tensor | None,
    token_ids: Tensor | None,
    first_sequence: int,
) -> Tensor:
    """The state vector of a batch that has places; all tensors of shape (sequences, tokens), on one device."""
    tally = Tally(learner.device)
    if sequence_ids is not None:
        if not mask.any():
            return empty_vector(learner.device)
        tally.add(packed_by_id(sampler, learner, mask, token_ids, sequence_ids))
        return tally.vector()
    on_cpu = learner.device.type == "cpu"
    if on_cpu:
        _let_malloc_reuse_memory()
    layout = packed if on_cpu else padded
    for rows in _chunks(mask):
        numbers = torch.arange(first_sequence + rows.start, first_sequence + rows.stop, device=mask.device)
        chunk_ids = None if token_ids is None else token_ids[rows]
        tally.add(layout(sampler[rows], learner[rows], mask[rows], chunk_ids, numbers))
    return tally.vector()


@cache
def _let_malloc_reuse_memory() -> None:
    """glibc returns large blocks to the system as they are freed, and the page faults of the next ones take as long as
    all arithmetic here. It stops with blocks up to the size of one that was freed: see M_MMAP_THRESHOLD in mallopt(3).
    The block is never written to, so it takes no memory. In other allocators, nothing changes.
    """
    torch.empty(REUSED_BYTES, dtype=torch.uint8)


def _chunks(mask: Tensor) -> Iterator[slice]:
    rows, columns = mask.shape
    if mask.device.type == "cpu":
        step = CPU_CHUNK * rows // max(1, int(mask.count_nonzero()))
    else:
        step = OTHER_CHUNK // columns
    step = max(1, step)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Tally:
    """What is counted over chunks of whole sequences. Each table has one more cell, for places without a token."""

    def __init__(self, device: torch.device) -> None:
        def table(size: int) -> Tensor:
            return torch.zeros(size + 1, dtype=torch.float64, device=device)

        self._histogram = table(BIN_COUNT)
        self._joint = table(PROBABILITY_BIN_COUNT**2)
        self._cells = torch.zeros(len(_CELL_SUMS), _CELLS + 1, dtype=torch.float64, device=device)
        self._greatest = table(_CELLS)
        self._sums: list[Tensor] = []
        self._extremes: list[Tensor] = []
        self._sequences: list[Tensor] = []
        self._worst: list[Tensor] = []

    def add(self, tokens: Tokens) -> None:
        magnitude = tokens.d.abs()
        reach = _bound(magnitude)
        ratios = Ratios(tokens.d, magnitude, reach)
        probabilities = [tokens.only_present(_probability(side)) for side in (tokens.sampler, tokens.learner)]
        probability_sums, largest_difference = _probability_sums(*probabilities)
        sums = (
            _difference_sums(tokens.d, magnitude)
            | _threshold_counts(tokens.d, magnitude, reach)
            | _log_prob_sums(tokens)
            | ratios.sums()
            | probability_sums
        )
        lowest, highest = (tokens.only_present(tokens.d, end) for end in (math.inf, -math.inf))
        self._sums.append(_in_order(sums, (*TOKEN_COUNTS, *TOKEN_SUMS)))
        self._extremes.append(torch.stack([lowest.amin(), highest.amax(), largest_difference]))
        self._sequences.append(SequenceFigures.rows(tokens, ratios))
        self._worst.append(_worst_of(tokens, magnitude))
        self._count(tokens, magnitude, *probabilities)

    def vector(self) -> Tensor:
        sequences = SequenceFigures(torch.cat(self._sequences, dim=1))
        tables = self._tables() | sequences.tables()
        extremes = torch.stack(self._extremes)
        d_max, prob_abs_max = extremes[:, 1:].amax(0).split(1)
        worst = self._worst[0] if len(self._worst) == 1 else worst_rows(torch.cat(self._worst))
        return torch.cat(
            [
                torch.stack(self._sums).sum(0),
                sequences.sums(),
                *(tables[name].flatten() for name in (*COUNT_TABLES, *SUM_TABLES)),
                extremes[:, :1].amin(0),
                sequences.least(),
                d_max,
                sequences.greatest(),
                prob_abs_max,
                sequences.magnitudes(),
                *(tables[name] for name in MAGNITUDE_TABLES),
                worst.flatten(),
            ]
        )

    def _count(self, tokens: Tokens, magnitude: Tensor, sampler_prob: Tensor, learner_prob: Tensor) -> None:
        sampler = probability_bin(tokens.sampler, sampler_prob)
        learner = probability_bin(tokens.learner, learner_prob)
        joint = learner.add_(sampler, alpha=PROBABILITY_BIN_COUNT).long()
        cell = sampler.mul_(POSITION_BAND_COUNT).add_(tokens.band).long()
        ones = torch.ones_like(magnitude)
        for table, index in ((self._histogram, difference_bin(tokens.d)), (self._joint, joint)):
            table.scatter_add_(0, _or_last(index, table, tokens.present), ones)
        cell = _or_last(cell, self._greatest, tokens.present)
        for table, values in zip(self._cells, (tokens.d, magnitude, magnitude.square(), ones), strict=True):
            table.scatter_add_(0, cell, values)
        self._greatest.scatter_reduce_(0, cell, magnitude, "amax")

    def _tables(self) -> dict[str, Tensor]:
        """Cells are (probability, position); the tokens' probabilities are in the joint histogram."""
        shape = (PROBABILITY_BIN_COUNT, POSITION_BAND_COUNT)
        cells = self._cells[:, :-1].unflatten(1, shape)
        greatest = self._greatest[:-1].view(shape)
        return (
            {"histogram": self._histogram[:-1], "joint": self._joint[:-1]}
            | {f"probability_{name}": sums for name, sums in zip(_CELL_SUMS, cells.sum(2), strict=True)}
            | {f"position_{name}": sums for name, sums in zip(_CELL_SUMS, cells.sum(1), strict=True)}
            | {"probability_d_abs_max": greatest.amax(1), "position_d_abs_max": greatest.amax(0)}
        )


def _difference_sums(d: Tensor, magnitude: Tensor) -> dict[str, Tensor]:
    return {"d_sum": d.sum(), "d_abs_sum": magnitude.sum(), "d_square_sum": torch.dot(d, d)}


def _bound(values: Tensor) -> float:
    """A bound of the values: their greatest on a CPU, where a look costs less than passes that nothing needs."""
    return float(values.max()) if values.device.type == "cpu" else math.inf


def _threshold_counts(d: Tensor, magnitude: Tensor, reach: float) -> dict[str, Tensor]:
    """Importance ratios beyond a threshold are found by their logarithm.

    Args:
        reach: a bound of the magnitude.
    """
    none = d.new_zeros(())

    def above(values: Tensor, threshold: float) -> Tensor:
        if reach <= threshold:
            return none
        # A comparison into float64 costs a quarter of one into bool.
        return torch.gt(values, threshold, out=torch.empty_like(values)).sum()

    return {
        **{name: above(magnitude, threshold) for name, threshold in TAILS.items()},
        "ratio_above_2_count": above(d, math.log(TRUNCATION)),
        "ratio_below_half_count": none if reach <= math.log(TRUNCATION) else above(-d, math.log(TRUNCATION)),
        "ratio_above_5_count": above(d, math.log(ICEPOP_HIGH)),
    }


def _log_prob_sums(tokens: Tokens) -> dict[str, Tensor]:
    return {
        "sampler_log_prob_sum": tokens.sampler.sum(),
        "learner_log_prob_sum": tokens.learner.sum(),
        "sampler_log_prob_square_sum": torch.dot(tokens.sampler, tokens.sampler),
        "learner_log_prob_square_sum": torch.dot(tokens.learner, tokens.learner),
        "log_prob_product_sum": torch.dot(tokens.sampler, tokens.learner),
    }


def _probability(log_prob: Tensor) -> Tensor:
    return log_prob.exp() if _bound(log_prob) <= EXPONENT_CAP else log_prob.clamp(max=EXPONENT_CAP).exp_()


def _probability_sums(sampler: Tensor, learner: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The sums, and the largest |Δp|."""
    difference = (learner - sampler).abs_()
    sums = {
        "sampler_prob_sum": sampler.sum(),
        "learner_prob_sum": learner.sum(),
        "sampler_prob_square_sum": torch.dot(sampler, sampler),
        "learner_prob_square_sum": torch.dot(learner, learner),
        "prob_product_sum": torch.dot(sampler, learner),
        "prob_abs_sum": difference.sum(),
        "prob_difference_square_sum": torch.dot(difference, difference),
    }
    return sums, difference.amax()


def _in_order(values: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.stack([values[name] for name in names])


def _or_last(index: Tensor, table: Tensor, present: Tensor | None) -> Tensor:
    return index if present is None else torch.where(present, index, len(table) - 1)


def _worst_of(tokens: Tokens, magnitude: Tensor) -> Tensor:
    """``WORST_TOKENS`` rows as in ``layout.WORST_COLUMNS``, in their order, because places are in that of sequences."""
    magnitude = tokens.only_present(magnitude, NO_TOKEN)
    index = largest(magnitude, WORST_TOKENS)
    sequence = tokens.sequence_at(index)
    columns = (
        magnitude[index],
        tokens.sampler[index],
        tokens.learner[index],
        tokens.numbers[sequence],
        tokens.place_of(index) - tokens.first[sequence],
        torch.full_like(index, -1) if tokens.token_id is None else tokens.token_id[index],
    )
    rows = torch.stack([column.double() for column in columns], dim=1)
    rows = torch.where(rows[:, :1] == NO_TOKEN, NO_TOKEN, rows)
    return pad(rows, (0, 0, 0, WORST_TOKENS - len(rows)), value=NO_TOKEN)
