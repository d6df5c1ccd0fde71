"""Turns one batch of log-probs into the state of its mismatch.

Nothing here depends on what an accelerator has computed, so nothing waits for it, unless ``sequence_ids`` are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp16_patch.mismatch.statistics.bins import (
    BIN_COUNT,
    EDGES,
    POSITION_BAND_COUNT,
    PROBABILITY_BIN_COUNT,
    difference_bin,
    probability_bin,
)
from fp16_patch.mismatch.statistics.layout import (
    NO_TOKEN,
    TOKEN_COUNTS,
    TOKEN_SUMS,
    WORST_TOKENS,
    empty_vector,
)
from fp16_patch.mismatch.statistics.ratios import EXPONENT_CAP, ICEPOP_HIGH, RATIO_BOUND, TRUNCATION, Ratios, ratios_of
from fp16_patch.mismatch.statistics.sequences import SequenceFigures
from fp16_patch.mismatch.statistics.tokens import POSITIVE_FROM, Tokens, packed, packed_by_id, padded
from fp16_patch.mismatch.statistics.worst import largest, worst_rows

TAILS = {"tail_1e_2_count": 1e-2, "tail_1e_1_count": 1e-1, "tail_1_count": 1.0}

CPU_CHUNK, OTHER_CHUNK = 1 << 17, 1 << 20
"""Tokens taken at once on a CPU, where more would leave its cache; places elsewhere, where it bounds their memory.

A place's intermediates take about 170 bytes, so that a chunk takes 170 MiB.
"""

REUSED_BYTES = 1 << 24
"""About what the intermediates of a chunk take on a CPU."""

_CELL_SHAPE = (PROBABILITY_BIN_COUNT, POSITION_BAND_COUNT)
_CELLS = math.prod(_CELL_SHAPE)
_MAGNITUDES, _TOKENS = 1, 3
"""The rows of |d| and of the tokens in the sums over cells, which are of d, |d|, d² and 1."""

_LOST_BITS = {"bfloat16": 0xFFFF, "float16": 0x1FFF}
"""The bits of a float32's significand that are 0 in what the dtype holds, as far as its range goes."""

_EXTREMES = ("d_min", "d_max", "prob_abs_max")


def state_of(
    sampler: Tensor,
    learner: Tensor,
    mask: Tensor,
    sequence_ids: Tensor | None,
    token_ids: Tensor | None,
    first_sequence: int,
) -> Tensor:
    """Measure a batch that has places; all tensors of shape (sequences, tokens), on one device."""
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
    """Make glibc keep large blocks that are freed, for the next ones.

    It returns them to the system, and the page faults of the next ones take as long as all arithmetic here. It stops
    that for blocks up to the size of one that was freed: see M_MMAP_THRESHOLD in mallopt(3). This block is never
    written to, so it takes no memory. In other allocators, nothing changes.
    """
    torch.empty(REUSED_BYTES, dtype=torch.uint8)


def _chunks(mask: Tensor) -> Iterator[slice]:
    rows, columns = mask.shape
    on_cpu = mask.device.type == "cpu"
    if on_cpu and mask.numel() > CPU_CHUNK:
        step = CPU_CHUNK * rows // max(1, int(mask.count_nonzero()))
    else:
        step = (CPU_CHUNK if on_cpu else OTHER_CHUNK) // columns
    step = max(1, step)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Tally:
    """Counts over chunks of whole sequences. Each table has one more cell, for places without a token."""

    def __init__(self, device: torch.device) -> None:
        def table(size: int) -> Tensor:
            return torch.zeros(size + 1, dtype=torch.float64, device=device)

        self._histogram = table(BIN_COUNT)
        self._joint = table(PROBABILITY_BIN_COUNT**2)
        self._cells = torch.zeros(_TOKENS + 1, _CELLS + 1, dtype=torch.float64, device=device)
        self._greatest = table(_CELLS)
        self._scalars: list[Tensor] = []
        self._sequences: list[Tensor] = []
        self._worst: list[Tensor] = []

    def add(self, tokens: Tokens) -> None:
        magnitude = tokens.d.abs()
        extremes, reach = _extremes(tokens)
        ratios = ratios_of(tokens.d, magnitude, reach)
        probabilities, change = _probabilities(tokens, ratios, reach)
        scalars = (
            extremes
            | _difference_sums(tokens.d, magnitude)
            | _threshold_counts(tokens.d, magnitude, reach)
            | _log_prob_sums(tokens)
            | _value_counts("sampler", tokens.sampler)
            | _value_counts("learner", tokens.learner)
            | ratios.sums()
            | _probability_figures(probabilities, change)
        )
        self._scalars.append(torch.stack([scalars[name] for name in (*TOKEN_COUNTS, *TOKEN_SUMS, *_EXTREMES)]))
        self._sequences.append(SequenceFigures.rows(tokens, ratios))
        self._worst.append(_worst_of(tokens, magnitude))
        self._count(tokens, magnitude, probabilities)

    def vector(self) -> Tensor:
        """Return the state vector, in the order of ``layout``."""
        sequences = SequenceFigures(_joined(self._sequences))
        sums, (d_min, d_max, prob_abs_max) = self._added_up()
        least, greatest = sequences.extremes()
        by_length, length_abs_max = sequences.by_length()
        # Cells are (probability, position). The tokens of each probability are in the joint histogram.
        cells = self._cells[:, :-1].unflatten(1, _CELL_SHAPE)
        by_probability, by_position = cells.sum(2), cells.sum(1)
        at_edges = cells[:, :, list(EDGES.values())]
        cells_abs_max = self._greatest[:-1].view(_CELL_SHAPE)
        return torch.cat(
            [
                sums,
                sequences.sums(),
                # COUNT_TABLES
                self._histogram[:-1],
                self._joint[:-1],
                sequences.density(),
                by_position[_TOKENS],
                by_length[0],
                at_edges[_TOKENS].flatten(),
                # SUM_TABLES
                by_probability[:_TOKENS].flatten(),
                by_position[:_TOKENS].flatten(),
                by_length[1:].flatten(),
                at_edges[_MAGNITUDES].flatten(),
                # LEAST, GREATEST, MAGNITUDES
                d_min,
                least,
                d_max,
                greatest,
                prob_abs_max,
                sequences.greatest_magnitude(),
                # MAGNITUDE_TABLES
                cells_abs_max.amax(1),
                cells_abs_max.amax(0),
                length_abs_max,
                # the worst tokens
                (self._worst[0] if len(self._worst) == 1 else worst_rows(torch.cat(self._worst))).flatten(),
            ]
        )

    def _added_up(self) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the sums, in their order, and the extremes, (1,) each."""
        rows = torch.stack(self._scalars)
        least, *most = rows[:, -len(_EXTREMES) :].unbind(1)
        return rows[:, : -len(_EXTREMES)].sum(0), [
            least.amin(0, keepdim=True),
            *(value.amax(0, keepdim=True) for value in most),
        ]

    def _count(self, tokens: Tokens, magnitude: Tensor, probabilities: Tensor) -> None:
        sampler, learner = probability_bin(probabilities).unbind()
        joint = learner.add_(sampler, alpha=PROBABILITY_BIN_COUNT).long()
        cell = sampler.mul_(POSITION_BAND_COUNT).add_(tokens.band).long()
        ones = torch.ones_like(magnitude)
        for table, index in ((self._histogram, difference_bin(tokens.d)), (self._joint, joint)):
            table.scatter_add_(0, _or_last(index, table, tokens.present), ones)
        cell = _or_last(cell, self._greatest, tokens.present)
        for table, values in zip(self._cells, (tokens.d, magnitude, magnitude.square(), ones), strict=True):
            table.scatter_add_(0, cell, values)
        self._greatest.scatter_reduce_(0, cell, magnitude, "amax")


def _difference_sums(d: Tensor, magnitude: Tensor) -> dict[str, Tensor]:
    return {"d_sum": d.sum(), "d_abs_sum": magnitude.sum(), "d_square_sum": torch.dot(d, d)}


def _extremes(tokens: Tokens) -> tuple[dict[str, Tensor], float]:
    """Return the least and the greatest d, and a bound of |d|: what no token reaches is not looked for."""
    lowest, highest = (tokens.only_present(tokens.d, end) for end in (math.inf, -math.inf))
    extremes = {"d_min": lowest.amin(), "d_max": highest.amax()}
    return extremes, max(-_known(extremes["d_min"], -math.inf), _known(extremes["d_max"], math.inf))


def _known(figure: Tensor, otherwise: float) -> float:
    """Return the figure on a CPU, where a look at it costs less than passes that nothing needs."""
    return float(figure) if figure.device.type == "cpu" else otherwise


def _threshold_counts(d: Tensor, magnitude: Tensor, reach: float) -> dict[str, Tensor]:
    """Count what is beyond each threshold; importance ratios are compared by their logarithm.

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


def _value_counts(side: str, log_probs: Tensor) -> dict[str, Tensor]:
    """Count log-probs that are none, and those that a coarser dtype holds exactly; 0, which any holds, says nothing."""
    values = log_probs.float()
    bits = values.view(torch.int32)
    nonzero = values.count_nonzero()
    some = _known(log_probs.amax(), math.inf) > POSITIVE_FROM
    counts = {
        "nonzero": nonzero,
        "positive": log_probs.gt(POSITIVE_FROM).count_nonzero() if some else torch.zeros_like(nonzero),
        **{name: nonzero - bits.bitwise_and(lost).count_nonzero() for name, lost in _LOST_BITS.items()},
    }
    return {f"{side}_{name}_count": count.double() for name, count in counts.items()}


def _probabilities(tokens: Tokens, ratios: Ratios, reach: float) -> tuple[Tensor, Tensor]:
    """Return μ and π of each token, (2, n), and π − μ, (n,); all 0 where no token is present."""
    both = tokens.d.new_empty(2, len(tokens.d))
    sampler, learner = both.unbind()
    _probability(tokens, tokens.sampler, out=sampler)
    if reach <= RATIO_BOUND:
        # From the ratio: no second exponential, and nothing cancels.
        change = sampler * ratios.excess
        torch.add(sampler, change, out=learner)
        return both, change
    _probability(tokens, tokens.learner, out=learner)
    return both, learner - sampler


def _probability(tokens: Tokens, log_prob: Tensor, out: Tensor) -> None:
    if _known(log_prob.amax(), math.inf) > EXPONENT_CAP:
        log_prob = log_prob.clamp(max=EXPONENT_CAP)
    torch.exp(log_prob, out=out)
    if tokens.present is not None:
        out.mul_(tokens.present)


def _probability_figures(probabilities: Tensor, change: Tensor) -> dict[str, Tensor]:
    sampler, learner = probabilities.unbind()
    size = change.abs()
    return {
        "sampler_prob_sum": sampler.sum(),
        "learner_prob_sum": learner.sum(),
        "sampler_prob_square_sum": torch.dot(sampler, sampler),
        "learner_prob_square_sum": torch.dot(learner, learner),
        "prob_product_sum": torch.dot(sampler, learner),
        "prob_abs_sum": size.sum(),
        "prob_difference_square_sum": torch.dot(change, change),
        "prob_abs_max": size.amax(),
    }


def _or_last(index: Tensor, table: Tensor, present: Tensor | None) -> Tensor:
    return index if present is None else torch.where(present, index, len(table) - 1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _worst_of(tokens: Tokens, magnitude: Tensor) -> Tensor:
    """Return the worst tokens' rows, ordered as by ``worst_rows``: equal ones lie by sequence and position already."""
    magnitude = tokens.only_present(magnitude, NO_TOKEN)
    index = largest(magnitude, WORST_TOKENS)
    sequence, place = tokens.sequence_at(index), tokens.place_of(index)
    columns = (
        magnitude[index],
        tokens.sampler[index],
        tokens.learner[index],
        tokens.numbers[sequence],
        place - tokens.first[sequence],
        torch.full_like(index, -1) if tokens.token_ids is None else tokens.token_ids[place],
    )
    rows = torch.stack([column.double() for column in columns], dim=1)
    if tokens.present is not None:
        rows = torch.where(rows[:, :1] == NO_TOKEN, NO_TOKEN, rows)
    missing = WORST_TOKENS - len(rows)
    return pad(rows, (0, 0, 0, missing), value=NO_TOKEN) if missing else rows
