"""Writes a state vector as a JSON object or as bytes, and reads it back."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.bins import BIN_COUNT, BINS_PER_SIGN, ZERO_BIN
from fp16_patch.mismatch.statistics.layout import (
    COUNTS,
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
            that it does not have.
    """
    if state.get("version") not in READABLE_VERSIONS:
        readable = f"{', '.join(map(str, READABLE_VERSIONS[:-1]))} and {READABLE_VERSIONS[-1]}"
        raise ValueError(f"mismatch state has version {state.get('version')!r}; this release reads {readable}")
    unknown = sorted(state.keys() - {"version", "worst", *SCALARS, *TABLES})
    if unknown:
        raise ValueError(f"mismatch state of version {state['version']} has unknown fields: {', '.join(unknown)}")
    vector = empty_vector()
    for name in state.keys() & set(SCALARS):
        vector[SLICES[name]] = state[name]
    vector[SLICES["histogram"]] = _dense_histogram(**state["histogram"])
    for name in state.keys() & set(TABLES) - {"histogram"}:
        vector[SLICES[name]] = _dense(name, **state[name])
    vector[WORST_PART] = _dense_worst(state.get("worst", []))
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


def _dense_histogram(bins: list[int], counts: list[int]) -> Tensor:
    if not all(-BINS_PER_SIGN <= index <= BINS_PER_SIGN for index in bins) or len(bins) != len(counts):
        raise ValueError(f"mismatch state has a histogram outside ±{BINS_PER_SIGN} bins, or not one count a bin")
    return _filled(BIN_COUNT, [index + ZERO_BIN for index in bins], counts)


def _dense(name: str, cells: list[int], values: list[float]) -> Tensor:
    size = SLICES[name].stop - SLICES[name].start
    if not all(0 <= cell < size for cell in cells) or len(cells) != len(values):
        raise ValueError(f"mismatch state has {name} outside {size} cells, or not one value a cell")
    return _filled(size, cells, values)


def _filled(size: int, cells: list[int], values: list[int] | list[float]) -> Tensor:
    filled = torch.zeros(size, dtype=torch.float64)
    filled[torch.tensor(cells, dtype=torch.int64)] = torch.tensor(values, dtype=torch.float64)
    return filled


def _dense_worst(rows: list[list[float]]) -> Tensor:
    width = len(WORST_COLUMNS)
    if len(rows) > WORST_TOKENS or any(len(row) != width - 1 for row in rows):
        raise ValueError(f"mismatch state has worst tokens other than up to {WORST_TOKENS} rows of {width - 1} numbers")
    none = [[NO_TOKEN] * width] * (WORST_TOKENS - len(rows))
    return torch.tensor([*([abs(row[1] - row[0]), *row] for row in rows), *none], dtype=torch.float64).flatten()
