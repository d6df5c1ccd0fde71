"""Reads per-token log-probs that some trainer wrote: JSON lines, one line a sequence or a batch of them."""

from __future__ import annotations

import gzip
import math
import os
import stat
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from fp16_patch.mismatch.record.states import Worst, worst_of
from fp16_patch.mismatch.report.dialects import Dialect, dialects
from fp16_patch.mismatch.report.dump_lines import DumpError, Place, Row, rows_of
from fp16_patch.mismatch.report.step_stretches import FIRST_STEPS, MOST_STRETCHES, StepNumbers, StepStretches
from fp16_patch.mismatch.statistics.layout import NO_TOKEN, WORST_COLUMNS, WORST_PART
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.mismatch.statistics.tokens import POSITIVE_FROM
from fp16_patch.untrusted.lines import lines_of, without_collector
from fp16_patch.untrusted.paths import is_file, is_folder, reason_of
from fp16_patch.untrusted.text import quoted

BATCH_TOKENS = 1 << 17
"""Sequences are compared in batches of at most so many tokens, padding included; a longer sequence alone."""

MAX_LINE_BYTES = 1 << 26
"""About 1.5 million tokens in one line."""

HELD_TOKENS, HELD_ROWS = 1 << 19, 1 << 14
"""Tokens, and sequences, that wait for others of their steps."""

MOST_LISTED = 5
FLOAT32_MAX = torch.finfo(torch.float32).max

UNLIKELY = 12.0
"""A mean negative log-likelihood is below this, the logarithm of a large vocabulary."""

SUFFIXES = (".jsonl", ".jsonl.gz")


class Dump(StepStretches):
    """What a dump comes to.

    Attributes:
        numbers: the steps, ascending; of many of them a stretch is measured as one, see ``StepStretches``.
        worst: (step, token) of the largest finite |d|, largest first.
        notes: what was left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Sequence[int] = ()
        self.worst: Worst = []
        self.notes: list[str] = []


def read_dump(path: str | Path, sampler_key: str | None = None, learner_key: str | None = None) -> Dump:
    """Measure the mismatch of each step in a file of sequences, or in all such files of a directory.

    A line is a JSON object, a sequence of n tokens, or with lists of such lists several sequences::

        {"step": 3, "sequence": 17, "sampler_log_probs": [n numbers], "learner_log_probs": [n numbers],
         "mask": [n of 0 and 1], "token_ids": [n integers]}

    ``step`` is 0 where it is left out; ``sequence``, an integer, names the sequence in the table of worst tokens, by
    default by how many the file has before it; without ``mask`` every token counts. A field that is null is left out;
    in a list, NaN, "NaN", null and infinities are non-finite, and so is what float32 cannot hold. The names of
    ``DIALECTS`` do as well. A name that ends in ``.gz`` is unpacked on the way. However long the file, one line,
    ``HELD_TOKENS`` tokens and ``MOST_STRETCHES`` summaries are held. Lines beyond ``MAX_LINE_BYTES`` are left out.

    Args:
        path: a file, or a directory whose ``*.jsonl`` and ``*.jsonl.gz`` are read, those in its folders too.
        sampler_key, learner_key: the names of log μ and log π, where they are none of the known ones.

    Raises:
        DumpError: a line that is not such an object, values that are no log-probs, a file that cannot be read, or
            nothing to read.
        FileNotFoundError: no such path.
    """
    batches = _Batches()
    known, given = dialects(sampler_key, learner_key), [key for key in (sampler_key, learner_key) if key]
    files, others = dump_files(Path(path))
    too_long: list[str] = []
    with without_collector():
        for row in (row for file in files for row in _rows(file, known, given, too_long)):
            batches.add(row)
        steps = batches.finish()
    left_out = [f"not a regular file, and left out: {quoted(file.name)}" for file in others[:MOST_LISTED]]
    steps.notes += _counted(too_long) + left_out
    if not steps:
        fix = "write one JSON object a line, one line a sequence"
        raise DumpError(Path(path), None, "; ".join(["holds no sequence", *steps.notes]), fix)
    return steps


def dump_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the file itself, or a directory's files in the order of their names; and those that are no files."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{quoted(path)}: no such file or directory")
    if not is_folder(path):
        return [path], []
    named = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and not is_folder(file))
    files = [file for file in named if is_file(file)]
    if not files:
        raise DumpError(path, None, f"no file ends in {' or '.join(SUFFIXES)}", "name the files")
    return files, [file for file in named if file not in {*files}]


def _counted(too_long: Sequence[str]) -> list[str]:
    if not too_long:
        return []
    lines = f"{len(too_long)} lines" if len(too_long) > 1 else "a line"
    return [f"{lines} of more than {MAX_LINE_BYTES >> 20} MiB left out, {too_long[0]} first: write one line a sequence"]


def _rows(file: Path, known: Sequence[Dialect], given: Sequence[str], too_long: list[str]) -> Iterator[Row]:
    count = 0
    for number, line in _lines(file):
        if line is None:
            too_long.append(f"{quoted(file.name)} line {number}")
        elif line.strip():
            for row in rows_of(Place(file, number), line, known, given):
                yield row if row.number is not None else replace(row, number=count)
                count += 1


def _lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    try:
        with _open(file) as lines:
            for number, (_, line) in enumerate(lines_of(lines, MAX_LINE_BYTES), start=1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as damage:
        fix = "compress it again, or give the file unpacked, without .gz in its name"
        raise DumpError(file, number + 1, f"cannot be unpacked: {damage}", fix) from damage
    except OSError as problem:
        raise DumpError(
            file, None, f"cannot be read: {reason_of(problem)}", "let it be read, or name others"
        ) from problem


def _open(file: Path) -> BinaryIO:
    # A pipe that a user names is read as it comes, such as `<(zcat …)`.
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        raise DumpError(file, None, "is neither a file nor a folder", "name a file of JSON lines")
    return cast(BinaryIO, gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


@dataclass
class _Batch:
    """Collects sequences of one stretch that will be padded together."""

    rows: list[Row] = field(default_factory=list)
    longest: int = 0

    def fits(self, row: Row) -> bool:
        """Return whether the sequence may join; the first one may, however long it is."""
        return not self.rows or (len(self.rows) + 1) * max(self.longest, len(row.sampler)) <= BATCH_TOKENS

    def append(self, row: Row) -> None:
        self.rows.append(row)
        self.longest = max(self.longest, len(row.sampler))


class _Batches:
    """Collects sequences on their way into the summaries of their stretches of steps."""

    def __init__(self) -> None:
        self._dump, self._numbers = Dump(), StepNumbers()
        self._stretches: set[int] = set()
        self._waiting: dict[int, _Batch] = {}
        self._held_rows = self._held_tokens = 0

    def add(self, row: Row) -> None:
        self._numbers.add(row.step)
        self._held_rows += 1
        self._held_tokens += len(row.sampler)
        self._wait(row)
        if self._held_rows > HELD_ROWS or self._held_tokens > HELD_TOKENS:
            self._compare_all()

    def finish(self) -> Dump:
        self._compare_all()
        dump = self._dump
        dump.numbers = self._numbers.sorted()
        if dump.width > 1:
            count, width = len(dump.numbers), dump.width
            dump.notes.append(f"of {count} steps those from step {FIRST_STEPS} on are measured {width} at a time")
        return dump

    def _wait(self, row: Row) -> None:
        stretch = self._dump.stretch_of(row.step)
        self._stretches.add(stretch)
        if len(self._stretches) > MOST_STRETCHES:
            self._widen()
            stretch = self._dump.stretch_of(row.step)
        batch = self._waiting.setdefault(stretch, _Batch())
        if not batch.fits(row):
            self._compare(stretch)
            batch = self._waiting[stretch] = _Batch()
        batch.append(row)

    def _widen(self) -> None:
        while len(self._stretches) > MOST_STRETCHES:
            self._dump.widen()
            self._stretches = {self._dump.stretch_of(stretch) for stretch in self._stretches}
        waiting, self._waiting = self._waiting, {}
        for row in (row for batch in waiting.values() for row in batch.rows):
            self._wait(row)

    def _compare_all(self) -> None:
        for stretch in [*self._waiting]:
            self._compare(stretch)

    def _compare(self, stretch: int) -> None:
        rows = self._waiting.pop(stretch).rows
        self._held_rows -= len(rows)
        self._held_tokens -= sum(len(row.sampler) for row in rows)
        stats = _stats(rows)
        steps = [rows[token.sequence].step for token in stats.worst_tokens()]
        stats = _named(stats, torch.tensor([row.number for row in rows]))
        self._dump.worst = worst_of([*self._dump.worst, *zip(steps, stats.worst_tokens(), strict=True)])
        self._dump.add(stretch, stats)


def _stats(rows: Sequence[Row]) -> MismatchStats:
    """Compare sequences; the worst tokens name them by their places here."""
    sampler, learner, mask = (
        _pad([getattr(row, name) for row in rows], torch.float64) for name in ("sampler", "learner", "mask")
    )
    for side, values in (("sampler", sampler), ("learner", learner)):
        _require_log_probs(rows, side, values, mask)
        values.masked_fill_(values < -FLOAT32_MAX, -math.inf)
    token_ids = _pad([row.token_ids for row in rows], torch.int64)
    stats: MismatchStats = MismatchStats.from_log_probs(sampler, learner, mask, token_ids=token_ids)
    return stats


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
    width = max(1, *map(len, rows))
    padded = array(rows[0].typecode, bytes(8 * width * len(rows)))
    for place, row in enumerate(rows):
        padded[place * width : place * width + len(row)] = row
    return torch.frombuffer(padded, dtype=dtype).view(len(rows), width)
