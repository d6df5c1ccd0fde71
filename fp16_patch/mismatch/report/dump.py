"""Reads per-token log-probs that some trainer wrote: JSON lines, one line a sequence or a batch of them."""

from __future__ import annotations

import gzip
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fp16_patch.mismatch.report.dialects import Dialect, dialects
from fp16_patch.mismatch.report.dump_lines import DumpError, Place, Row, rows_of
from fp16_patch.mismatch.statistics.layout import NO_TOKEN, WORST_COLUMNS, WORST_PART
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.mismatch.statistics.tokens import POSITIVE_FROM

BATCH_TOKENS = 1 << 17
"""Sequences are compared in batches of at most so many tokens, padding included; a longer sequence alone."""

UNLIKELY = 12.0
"""A mean negative log-likelihood is below this, the logarithm of a large vocabulary."""

SUFFIXES = (".jsonl", ".jsonl.gz")


def read_dump(
    path: str | Path, sampler_key: str | None = None, learner_key: str | None = None
) -> dict[int, MismatchStats]:
    """Measure the mismatch of each step in a file of sequences, or in all such files of a directory.

    A line is a JSON object, a sequence of n tokens, or with lists of such lists several sequences::

        {"step": 3, "sequence": 17, "sampler_log_probs": [n numbers], "learner_log_probs": [n numbers],
         "mask": [n of 0 and 1], "token_ids": [n integers]}

    ``step`` is 0 where it is left out; ``sequence``, an integer, names the sequence in the table of worst tokens, by
    default by how many the file has before it; without ``mask`` every token counts. A field that is null is left out;
    in a list, NaN, "NaN", null and infinities are non-finite. The names of ``DIALECTS`` do as well. A name that ends in
    ``.gz`` is unpacked on the way. However long the file, ``BATCH_TOKENS`` tokens and one summary a step are held.

    Args:
        path: a file, or a directory whose ``*.jsonl`` and ``*.jsonl.gz`` are read, those in its folders too.
        sampler_key, learner_key: the names of log μ and log π, where they are none of the known ones.

    Raises:
        DumpError: a line that is not such an object, values that are no log-probs, or nothing to read.
        FileNotFoundError: no such path.
    """
    batches = _Batches()
    known, given = dialects(sampler_key, learner_key), [key for key in (sampler_key, learner_key) if key]
    for file in dump_files(Path(path)):
        for row in _rows(file, known, given):
            batches.add(row)
    steps = batches.finish()
    if not steps:
        raise DumpError(Path(path), None, "holds no sequence", "write one JSON object a line, one line a sequence")
    return steps


def dump_files(path: Path) -> list[Path]:
    """List the file itself, or a directory's files in the order of their names."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
    if not files:
        raise DumpError(path, None, f"no file ends in {' or '.join(SUFFIXES)}", "name the files")
    return files


def _rows(file: Path, known: Sequence[Dialect], given: Sequence[str]) -> Iterator[Row]:
    count = 0
    for number, line in _lines(file):
        if line.strip():
            for row in rows_of(Place(file, number), line, known, given):
                yield row if row.number is not None else replace(row, number=count)
                count += 1


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except (EOFError, gzip.BadGzipFile) as damage:
        fix = "compress it again, or give the file unpacked, without .gz in its name"
        raise DumpError(file, number + 1, f"cannot be unpacked: {damage}", fix) from damage


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", errors="replace")
    return file.open(encoding="utf-8", errors="replace")


@dataclass
class _Batch:
    """Collects sequences of one step that will be padded together."""

    rows: list[Row] = field(default_factory=list)
    longest: int = 0
    tokens: int = 0

    def fits(self, row: Row) -> bool:
        return (len(self.rows) + 1) * max(self.longest, len(row.sampler)) <= BATCH_TOKENS

    def append(self, row: Row) -> None:
        self.rows.append(row)
        self.longest = max(self.longest, len(row.sampler))
        self.tokens += len(row.sampler)


@dataclass
class _Batches:
    """Collects sequences on their way into the summaries of their steps."""

    steps: dict[int, MismatchStats] = field(default_factory=dict)
    waiting: dict[int, _Batch] = field(default_factory=lambda: defaultdict(_Batch))
    held: int = 0

    def add(self, row: Row) -> None:
        if not self.waiting[row.step].fits(row):
            self._compare(row.step)
        self.waiting[row.step].append(row)
        self.held += len(row.sampler)
        if self.held > BATCH_TOKENS:
            self.finish()

    def finish(self) -> dict[int, MismatchStats]:
        for step in list(self.waiting):
            self._compare(step)
        return dict(sorted(self.steps.items()))

    def _compare(self, step: int) -> None:
        batch = self.waiting.pop(step)
        self.held -= batch.tokens
        if batch.rows:
            self.steps[step] = self.steps.get(step, MismatchStats.empty()) + _stats(batch.rows)


def _stats(rows: Sequence[Row]) -> MismatchStats:
    sampler, learner, mask = (
        _pad([getattr(row, name) for row in rows], torch.float64) for name in ("sampler", "learner", "mask")
    )
    for side, values in (("sampler", sampler), ("learner", learner)):
        _require_log_probs(rows, side, values, mask)
    token_ids = _pad([row.token_ids for row in rows], torch.int64)
    stats = MismatchStats.from_log_probs(sampler, learner, mask, token_ids=token_ids)
    return _named(stats, torch.tensor([row.number for row in rows]))


def _require_log_probs(rows: Sequence[Row], side: str, values: Tensor, mask: Tensor) -> None:
    """Raise ``DumpError`` at the first value of a sampled token that is above 0 by more than rounding."""
    found = ((values > POSITIVE_FROM) & values.isfinite() & mask.bool()).nonzero()
    if not len(found):
        return
    row, token = found[0].tolist()
    key, sampled = getattr(rows[row].keys, side), values[row][mask[row].bool()]
    sampled = sampled[sampled.isfinite()]
    problem = f"{key}[{token}] is {float(values[row, token]):.6g}: a log-prob is not above 0, so these are no log-probs"
    raise rows[row].place.error(f"{problem}, and nothing is computed from them", _instead_of(sampled))


def _instead_of(values: Tensor) -> str:
    """Say what to give instead of a sequence's values, by what they look like."""
    if float(values.min()) >= 0 and float(values.mean()) < UNLIKELY:
        return "give the logarithms of probabilities" if float(values.max()) <= 1 else "give them with a minus sign"
    return "give log-probs, normalized over the vocabulary (log_softmax), not logits"


def _named(stats: MismatchStats, numbers: Tensor) -> MismatchStats:
    """Name the worst tokens' sequences ``numbers[row]``. As ids these would have to be distinct."""
    vector = stats.vector.clone()
    worst = vector[WORST_PART].view(-1, len(WORST_COLUMNS))
    column = WORST_COLUMNS.index("sequence")
    found = worst[:, 0] != NO_TOKEN
    worst[found, column] = numbers[worst[found, column].long()].double()
    return MismatchStats(vector)


def _pad(rows: Sequence[array[Any]], dtype: torch.dtype) -> Tensor:
    padded = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=dtype)
    for values, row in zip(rows, padded, strict=True):
        if values:
            row[: len(values)] = torch.frombuffer(values, dtype=dtype)
    return padded
