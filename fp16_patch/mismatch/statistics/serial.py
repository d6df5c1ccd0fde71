"""Writes a state vector as a JSON object or as bytes, and reads it back."""

from __future__ import annotations

import math
import zlib
from array import array
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.bins import BINS_PER_SIGN, ZERO_BIN
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
    STATE_SIZE,
    TABLES,
    WORST_COLUMNS,
    WORST_PART,
    WORST_TOKENS,
    empty_vector,
    start_of,
    table,
)

STATE_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
MAGIC = b"fp16mm"

_MOST = float(1 << 53)
"""Counts are exact up to this."""

_MOST_SUM = 1e100
"""No sum of what float32 holds, nor its square, is beyond this; and a float holds the square of this."""

_FIELDS = frozenset({"version", "worst", *SCALARS, *TABLES})
_PLACES = {name: SLICES[name].start for name in SCALARS}
# They lie one after the other.
_COUNT_TABLES = slice(min(SLICES[name].start for name in COUNT_TABLES), max(SLICES[name].stop for name in COUNT_TABLES))
WHOLE_COLUMNS = tuple(map(WORST_COLUMNS.index, ("sequence", "position", "token_id")))
# Where a table's cell 0 is, and between which cells it lies.
CELLS = {name: (SLICES[name].start, 0, SLICES[name].stop - SLICES[name].start) for name in TABLES} | {
    "histogram": (SLICES["histogram"].start + ZERO_BIN, -BINS_PER_SIGN, BINS_PER_SIGN + 1)
}


def as_dict(vector: Tensor) -> dict[str, Any]:
    """Write a vector as a JSON object; see ``MismatchStats.to_dict``."""
    scalars = {name: vector[SLICES[name].start].item() for name in SCALARS}
    others = {name: table(vector, name) for name in TABLES if name != "histogram"}
    histogram = table(vector, "histogram")
    occupied = histogram.nonzero().flatten()
    worst = vector[WORST_PART].view(WORST_TOKENS, -1)
    return {
        "version": STATE_VERSION,
        **{name: int(x) if name in COUNTS else x for name, x in scalars.items() if x != start_of(name)},
        "histogram": {"bins": (occupied - ZERO_BIN).tolist(), "counts": histogram[occupied].tolist()},
        **{name: _sparse(values) for name, values in others.items() if values.any()},
        "worst": worst[worst[:, 0] != NO_TOKEN, 1:].tolist(),
    }


def of_dict(state: dict[str, Any]) -> Tensor:
    """Read the vector of ``as_dict``. Versions 1 and 2 are read too: what they lack is empty.

    Raises:
        ValueError: a version not in ``READABLE_VERSIONS``, a field that this version does not have, a table with cells
            that it does not have, what is no number, or numbers that no tokens can have.
    """
    _require_fields(state)
    values = array("d", _empty_values())
    for name, content in state.items():
        try:
            if (place := _PLACES.get(name)) is not None:
                values[place] = content
            elif name in CELLS:
                _fill(values, name, content)
            elif name == "worst":
                worst = _worst_numbers(content)
                values[WORST_PART.start : WORST_PART.start + len(worst)] = worst
        except (KeyError, OverflowError, TypeError):
            raise ValueError(f"mismatch state has {name} that is not of numbers") from None
    vector = torch.frombuffer(values, dtype=torch.float64)
    _require_possible(vector, values)
    return vector


def as_bytes(vector: Tensor) -> bytes:
    """Write a vector as bytes; see ``MismatchStats.to_bytes``."""
    raw = bytearray(STATE_SIZE * 8)
    torch.frombuffer(raw, dtype=torch.float64).copy_(vector)
    return MAGIC + bytes([STATE_VERSION]) + zlib.compress(raw, level=1)


def of_bytes(message: bytes) -> Tensor:
    """Read the vector of ``as_bytes``.

    Raises:
        ValueError: not a message of ``as_bytes``, another version, or a damaged one.
    """
    header = MAGIC + bytes([STATE_VERSION])
    if message[: len(header)] != header:
        raise ValueError(f"not a mismatch state of version {STATE_VERSION}: it begins with {message[: len(header)]!r}")
    try:
        raw = bytearray(zlib.decompress(message[len(header) :]))
    except zlib.error as damage:
        raise ValueError(f"mismatch state of {len(message)} bytes is damaged: {damage}") from damage
    if len(raw) != STATE_SIZE * 8:
        raise ValueError(f"mismatch state holds {len(raw)} bytes, not {STATE_SIZE * 8}")
    return torch.frombuffer(raw, dtype=torch.float64)


def _sparse(values: Tensor) -> dict[str, list[float]]:
    occupied = values.nonzero().flatten()
    return {"cells": occupied.tolist(), "values": values[occupied].tolist()}


def _require_fields(state: dict[str, Any]) -> None:
    if has_fields(state):
        return
    if state.get("version") not in READABLE_VERSIONS:
        readable = f"{', '.join(map(str, READABLE_VERSIONS[:-1]))} and {READABLE_VERSIONS[-1]}"
        raise ValueError(f"mismatch state has version {state.get('version')!r}; this release reads {readable}")
    unknown = ", ".join(sorted(state.keys() - _FIELDS))
    raise ValueError(f"mismatch state of version {state['version']} has unknown fields: {unknown}")


def has_fields(state: dict[str, Any]) -> bool:
    """Return whether a state is of a version that is read, and has no other fields."""
    return state.get("version") in READABLE_VERSIONS and state.keys() <= _FIELDS


@cache
def _empty_values() -> array[float]:
    return array("d", empty_vector().tolist())


def _fill(values: array[float], name: str, content: Any) -> None:
    """Put a table's values into their cells; bins of the histogram are counted from its middle."""
    cells, numbers = lists_of(name, content)
    start, low, high = CELLS[name]
    if len(cells) != len(numbers) or (cells and not low <= min(cells) <= max(cells) < high):
        held, one = (f"±{high - 1} bins", "count a bin") if low else (f"{high} cells", "value a cell")
        raise ValueError(f"mismatch state has {name} outside {held}, or not one {one}")
    for cell, number in zip(cells, numbers, strict=True):
        values[start + cell] += number


def lists_of(name: str, content: Any) -> tuple[list[Any], list[Any]]:
    """Return a table's cells and their values, which may still be anything.

    Raises:
        KeyError, TypeError: it is no table.
    """
    first, last = ("bins", "counts") if name == "histogram" else ("cells", "values")
    cells, numbers = content[first], content[last]
    if type(cells) is not list or type(numbers) is not list or len(content) > 2:
        raise TypeError
    return cells, numbers


def _worst_numbers(rows: Any) -> array[float]:
    """Return the rows of the worst tokens one after the other, each with its magnitude first.

    Raises:
        TypeError, OverflowError: they are not of numbers.
        ValueError: there are more, or longer ones, or places and ids that are not whole.
    """
    width = len(WORST_COLUMNS)
    few = isinstance(rows, list) and len(rows) <= WORST_TOKENS
    if not few or not all(isinstance(row, list) and len(row) == width - 1 for row in rows):
        raise ValueError(f"mismatch state has worst tokens other than up to {WORST_TOKENS} rows of {width - 1} numbers")
    numbers = array("d")
    for row in rows:
        numbers.append(abs(row[1] - row[0]))
        numbers.extend(row)
    if not all(map(float.is_integer, (number for column in WHOLE_COLUMNS for number in numbers[column::width]))):
        raise ValueError("mismatch state has worst tokens whose places or ids are not whole")
    return numbers


@cache
def bounds() -> tuple[Tensor, Tensor]:
    """Return the least and the greatest that each number of a state may be."""
    least, greatest = (torch.full((STATE_SIZE,), bound, dtype=torch.float64) for bound in (-_MOST_SUM, _MOST_SUM))
    for name in (*COUNTS, *COUNT_TABLES):
        least[SLICES[name]], greatest[SLICES[name]] = 0.0, _MOST
    for name in (*MAGNITUDES, *MAGNITUDE_TABLES):
        least[SLICES[name]] = 0.0
    for name in (*LEAST, *GREATEST):
        least[SLICES[name]], greatest[SLICES[name]] = -math.inf, math.inf
    for column in WHOLE_COLUMNS:
        least[WORST_PART][column :: len(WORST_COLUMNS)] = -_MOST
        greatest[WORST_PART][column :: len(WORST_COLUMNS)] = _MOST
    return least, greatest


def _require_possible(vector: Tensor, values: array[float]) -> None:
    """Raise ``ValueError`` for numbers that no tokens can have, NaN among them; both are the same state."""
    inside, counts = vector.clamp(*bounds()), vector[_COUNT_TABLES]
    if not torch.equal(inside, vector):
        place = int((inside != vector).nonzero()[0])
        name = next(name for name, part in SLICES.items() if part.start <= place < part.stop)
        raise ValueError(f"mismatch state has {name} that no tokens can have: {values[place]}")
    if not torch.equal(counts, counts.trunc()) or not all(values[_PLACES[name]].is_integer() for name in COUNTS):
        raise ValueError("mismatch state has counts that are not whole")
    for kind in ("tokens", "sequences"):
        every, nonfinite, weighed = (values[_PLACES[part + kind]] for part in ("", "nonfinite_", "weighed_"))
        if nonfinite + weighed > every:
            raise ValueError(f"mismatch state has more non-finite and weighed {kind} than {kind}")
    finite = values[_PLACES["tokens"]] - values[_PLACES["nonfinite_tokens"]]
    if float(vector[SLICES["histogram"]].sum()) != finite:
        raise ValueError(f"mismatch state has a histogram of other than its {finite:.0f} finite tokens")
