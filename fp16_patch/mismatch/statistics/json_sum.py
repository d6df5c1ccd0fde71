"""Adds up many states as they stand in JSON, without a vector of each: so a long record is read in half the time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics import serial
from fp16_patch.mismatch.statistics.layout import (
    COUNT_TABLES,
    COUNTS,
    GREATEST,
    LEAST,
    MAGNITUDE_TABLES,
    MAGNITUDES,
    NO_TOKEN,
    SCALARS,
    SLICES,
    TABLES,
    WORST_COLUMNS,
    WORST_PART,
    WORST_TOKENS,
    empty_vector,
    start_of,
)
from fp16_patch.mismatch.statistics.worst import worst_rows

_STARTS = [(name, start_of(name)) for name in SCALARS]
_TOKENS, _NONFINITE = SCALARS.index("tokens"), SCALARS.index("nonfinite_tokens")
_KINDS = {name: kind for kind, name in enumerate(TABLES)}


def sum_of_dicts(states: Sequence[dict[str, Any]]) -> Tensor:
    """Return the sum of states, at least one, as the vector of ``layout``.

    Raises:
        ValueError: one of them is none that ``serial.of_dict`` reads; that one says what is wrong with it.
    """
    try:
        scalars, cells, worst = _scalars(states), _cells(states), _worst(states)
    except (AttributeError, KeyError, OverflowError, TypeError):
        raise ValueError("one of the states is not of numbers") from None
    kinds = _kinds()
    finite = scalars[:, _TOKENS] - scalars[:, _NONFINITE]
    of_histogram = cells.kinds == _KINDS["histogram"]
    counted = torch.zeros_like(finite).index_add_(0, cells.states[of_histogram], cells.numbers[of_histogram])
    _require(torch.equal(counted, finite))
    vector = empty_vector()
    merged = torch.where(
        kinds.is_least, scalars.amin(0), torch.where(kinds.is_greatest, scalars.amax(0), scalars.sum(0))
    )
    vector[kinds.places] = merged
    is_magnitude = kinds.is_magnitude[cells.kinds]
    vector.index_add_(0, cells.places[~is_magnitude], cells.numbers[~is_magnitude])
    vector.scatter_reduce_(0, cells.places[is_magnitude], cells.numbers[is_magnitude], "amax")
    vector[WORST_PART] = worst
    return vector


class _Kinds(NamedTuple):
    """Of each single figure its place and how it merges; of each table where its cells lie and how they merge."""

    places: Tensor
    is_least: Tensor
    is_greatest: Tensor
    is_count: Tensor
    starts: Tensor
    lows: Tensor
    highs: Tensor
    is_magnitude: Tensor
    is_counted: Tensor


@cache
def _kinds() -> _Kinds:
    starts, lows, highs = (
        torch.tensor(column) for column in zip(*(serial.CELLS[name] for name in TABLES), strict=True)
    )
    return _Kinds(
        places=torch.tensor([SLICES[name].start for name in SCALARS]),
        is_least=torch.tensor([name in LEAST for name in SCALARS]),
        is_greatest=torch.tensor([name in (*GREATEST, *MAGNITUDES) for name in SCALARS]),
        is_count=torch.tensor([name in COUNTS for name in SCALARS]),
        starts=starts,
        lows=lows,
        highs=highs,
        is_magnitude=torch.tensor([name in MAGNITUDE_TABLES for name in TABLES]),
        is_counted=torch.tensor([name in COUNT_TABLES for name in TABLES]),
    )


def _scalars(states: Sequence[dict[str, Any]]) -> Tensor:
    """Return the single figures, (states, figures)."""
    numbers: list[Any] = []
    for state in states:
        _require(serial.has_fields(state))
        numbers += [state.get(name, start) for name, start in _STARTS]
    scalars, kinds = _tensor(array("d", numbers)).view(len(states), -1), _kinds()
    least, greatest = serial.bounds()
    _require_between(scalars, least[kinds.places], greatest[kinds.places])
    counts = scalars[:, kinds.is_count]
    _require(torch.equal(counts, counts.trunc()))
    for kind in ("tokens", "sequences"):
        every, nonfinite, weighed = (scalars[:, SCALARS.index(part + kind)] for part in ("", "nonfinite_", "weighed_"))
        _require(bool((nonfinite + weighed <= every).all()))
    return scalars


class _Cells(NamedTuple):
    """Every cell of every table: whose state's it is, of which table, its place in the vector, and its number."""

    states: Tensor
    kinds: Tensor
    places: Tensor
    numbers: Tensor


def _cells(states: Sequence[dict[str, Any]]) -> _Cells:
    # Lists grow faster than arrays, and become arrays faster at once: that is where a long record's time goes.
    tables: list[int] = []
    cells: list[Any] = []
    numbers: list[Any] = []
    for index, state in enumerate(states):
        for name, kind in _KINDS.items():
            if name in state:
                table_cells, table_numbers = serial.lists_of(name, state[name])
                _require(len(table_cells) == len(table_numbers))
                tables += (index, kind, len(table_cells))
                cells += table_cells
                numbers += table_numbers
    owners = _tensor(array("q", tables)).view(-1, 3)
    of_states, of_kinds = owners[:, :2].repeat_interleave(owners[:, 2], dim=0).unbind(1)
    at, values, kinds = _tensor(array("q", cells)), _tensor(array("d", numbers)), _kinds()
    _require_between(at, kinds.lows[of_kinds], kinds.highs[of_kinds] - 1)
    places = at + kinds.starts[of_kinds]
    least, greatest = serial.bounds()
    _require_between(values, least[places], greatest[places])
    counts = values[kinds.is_counted[of_kinds]]
    _require(torch.equal(counts, counts.trunc()))
    return _Cells(of_states, of_kinds, places, values)


def _worst(states: Sequence[dict[str, Any]]) -> Tensor:
    """Return the worst tokens of all, as they lie in the vector."""
    width = len(WORST_COLUMNS)
    numbers: list[Any] = []
    for state in states:
        of_state = state.get("worst", [])
        _require(type(of_state) is list and len(of_state) <= WORST_TOKENS and {*map(len, of_state)} <= {width - 1})
        for row in of_state:
            numbers += row
    rows = _tensor(array("d", numbers)).view(-1, width - 1)
    rows = torch.cat([(rows[:, 1:2] - rows[:, :1]).abs(), rows], dim=1)
    least, greatest = (bound[WORST_PART].view(-1, width)[0] for bound in serial.bounds())
    _require_between(rows, least, greatest)
    whole = rows[:, list(serial.WHOLE_COLUMNS)]
    _require(torch.equal(whole, whole.trunc()))
    if len(rows) > WORST_TOKENS:
        # Those that tie with the last one are among the candidates.
        rows = rows[rows[:, 0] >= rows[:, 0].topk(WORST_TOKENS).values[-1]]
    none = torch.full((WORST_TOKENS, width), NO_TOKEN, dtype=torch.float64)
    return worst_rows(torch.cat([rows, none])).flatten()


def _tensor(numbers: array[int] | array[float]) -> Tensor:
    dtype = torch.float64 if numbers.typecode == "d" else torch.int64
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)


def _require_between(numbers: Tensor, least: Tensor, greatest: Tensor) -> None:
    # NaN is equal to nothing.
    _require(torch.equal(numbers.clamp(least, greatest), numbers))


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("one of the states is damaged")
