"""Reads per-token log-probs that some trainer wrote: JSON lines, one line a sequence."""

from __future__ import annotations

import gzip
import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.layout import NO_TOKEN, WORST_COLUMNS, WORST_PART
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.plan.errors import Fp16PatchError

BATCH_TOKENS = 1 << 17
"""Sequences are compared in batches of at most so many tokens, padding included; a longer sequence alone."""

SUFFIXES = (".jsonl", ".jsonl.gz")
UNKNOWN_TOKEN = -1


@dataclass(frozen=True)
class Dialect:
    """Names what one framework calls the log-probs of a sequence; None for what it has no name for."""

    framework: str
    sampler: str
    learner: str
    mask: str
    token_ids: str | None = None


# Ours first: the order in which they are tried. The others are the names of a framework's batch or export.
DIALECTS = (
    Dialect("fp16_patch", "sampler_log_probs", "learner_log_probs", "mask", "token_ids"),
    Dialect("verl", "rollout_log_probs", "old_log_probs", "response_mask", "responses"),
    Dialect("OpenRLHF", "rollout_log_probs", "action_log_probs", "action_mask"),
    Dialect("slime", "rollout_log_probs", "log_probs", "loss_masks"),
    Dialect("TRL", "sampling_per_token_logps", "old_per_token_logps", "completion_mask", "completion_ids"),
    Dialect("NeMo-RL", "generation_logprobs", "prev_logprobs", "token_mask", "input_ids"),
    Dialect("prime-rl", "inference_logprobs", "trainer_logprobs", "loss_mask", "token_ids"),
)


class DumpError(Fp16PatchError, ValueError):
    """Says which line cannot be compared, and why.

    Args:
        path, line: where, lines counted from 1; ``line`` is None for a whole file.
        problem: what is wrong.
        fix: what to change.
    """

    def __init__(self, path: Path, line: int | None, problem: str, fix: str) -> None:
        self.arguments = (path, line, problem, fix)
        where = str(path) if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {problem}. Fix: {fix}")

    def __reduce__(self) -> tuple[type[DumpError], tuple[Path, int | None, str, str]]:
        return type(self), self.arguments


@dataclass(frozen=True)
class Row:
    """Holds one sequence: its name, its tokens' log-probs on both sides, which of them were sampled, and their ids."""

    step: int
    number: int
    sampler: array[float]
    learner: array[float]
    mask: array[float]
    token_ids: array[int]


def read_dump(
    path: str | Path, sampler_key: str | None = None, learner_key: str | None = None
) -> dict[int, MismatchStats]:
    """Measure the mismatch of each step in a file of sequences, or in all such files of a directory.

    A line is a JSON object, a sequence of n tokens::

        {"step": 3, "sequence": 17, "sampler_log_probs": [n numbers], "learner_log_probs": [n numbers],
         "mask": [n of 0 and 1], "token_ids": [n integers]}

    ``step`` is 0 where it is left out; ``sequence``, an integer, names the sequence in the table of worst tokens, by
    default the line's number from 0; without ``mask`` every token counts. NaN, "NaN", null and infinities are
    non-finite. The names of ``DIALECTS`` do as well. A name that ends in ``.gz`` is unpacked on the way. However long
    the file, ``BATCH_TOKENS`` tokens and one summary a step are held.

    Args:
        path: a file, or a directory whose ``*.jsonl`` and ``*.jsonl.gz`` are read, those in its folders too.
        sampler_key, learner_key: the names of log μ and log π, where they are none of the known ones.

    Raises:
        DumpError: a line that is not such an object, or nothing to read.
        FileNotFoundError: no such path.
    """
    batches = _Batches()
    for file in dump_files(Path(path)):
        for row in _rows(file, _dialects(sampler_key, learner_key)):
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


def _dialects(sampler_key: str | None, learner_key: str | None) -> list[Dialect]:
    """Return the known dialects, with the user's names in the place of theirs."""
    given = {name: key for name, key in (("sampler", sampler_key), ("learner", learner_key)) if key}
    return [replace(dialect, **given) for dialect in DIALECTS]


def _rows(file: Path, dialects: Sequence[Dialect]) -> Iterator[Row]:
    for number, line in _lines(file):
        if line.strip():
            yield _row(_Line(file, number), line, dialects)


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


@dataclass(frozen=True)
class _Line:
    """Says where a line is, in what is said about it."""

    file: Path
    number: int

    def error(self, problem: str, fix: str) -> DumpError:
        return DumpError(self.file, self.number, problem, fix)


def _row(line: _Line, text: str, dialects: Sequence[Dialect]) -> Row:
    content = _object(line, text)
    dialect = _spoken(line, content, dialects)
    sampler, learner = (_log_probs(line, key, content[key]) for key in (dialect.sampler, dialect.learner))
    if len(sampler) != len(learner):
        problem = f"{dialect.sampler} has {len(sampler)} entries, {dialect.learner} has {len(learner)}"
        raise line.error(problem, "give both sides' log-probs of the same tokens, in the same order")
    mask_key = next((key for key in _mask_keys(dialect) if content.get(key) is not None), None)
    ids = content.get(dialect.token_ids) if dialect.token_ids else None
    size = len(sampler)
    return Row(
        step=_step(line, content.get("step", 0)),
        number=_number(line, content),
        sampler=sampler,
        learner=learner,
        mask=array("d", [1]) * size if mask_key is None else _mask(line, mask_key, content[mask_key], size),
        token_ids=array("q", [UNKNOWN_TOKEN]) * size if ids is None else _ids(line, str(dialect.token_ids), ids, size),
    )


def _object(line: _Line, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as problem:
        fix = "write one JSON object a line; leave out a last line that a killed run did not finish"
        raise line.error(f"not JSON: {problem}", fix) from problem
    if not isinstance(content, dict):
        raise line.error(f"a JSON {type(content).__name__}, not an object", "write one JSON object a line")
    return content


def _spoken(line: _Line, content: Mapping[str, Any], dialects: Sequence[Dialect]) -> Dialect:
    for dialect in dialects:
        if dialect.sampler in content and dialect.learner in content:
            return dialect
    accepted = "; ".join(
        dict.fromkeys(f"{dialect.sampler} with {dialect.learner} ({dialect.framework})" for dialect in dialects)
    )
    found = ", ".join(sorted(content)) or "none"
    fix = f"use one of these pairs: {accepted}; or name yours with --sampler-key and --learner-key"
    raise line.error(f"the log-probs of sampler and learner are not in it; its keys: {found}", fix)


def _mask_keys(dialect: Dialect) -> list[str]:
    """List the names a mask is looked for under: one that is overlooked would count what was not sampled."""
    return list(dict.fromkeys([dialect.mask, *(known.mask for known in DIALECTS)]))


def _step(line: _Line, step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, int):
        raise line.error(f"step is {_shown(step)}", "give the number of the training step, an integer")
    return step


def _number(line: _Line, content: Mapping[str, Any]) -> int:
    sequence = content.get("sequence")
    return sequence if isinstance(sequence, int) and sequence >= 0 else line.number - 1


def _log_probs(line: _Line, key: str, values: Any) -> array[float]:
    try:
        return array("d", values)  # fast, and refuses null and strings
    except TypeError:
        if not isinstance(values, list):
            raise line.error(f"{key} is {_shown(values)}", "give a list of numbers, one a token") from None
    return array("d", (_log_prob(line, key, place, value) for place, value in enumerate(values)))


def _log_prob(line: _Line, key: str, place: int, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        fix = "give a number, or null, NaN or an infinity for what is not finite"
        raise line.error(f"{key}[{place}] is {_shown(value)}", fix) from None


def _mask(line: _Line, key: str, values: Any, size: int) -> array[float]:
    fix = f"give {size} of 0 and 1, as many as log-probs: 1 for a sampled token"
    if not isinstance(values, list) or len(values) != size:
        raise line.error(f"{key} {_shape(values)}, the log-probs have {size}", fix)
    if not all(value in (0, 1) for value in values):
        raise line.error(f"{key} has {_shown(next(value for value in values if value not in (0, 1)))} in it", fix)
    return array("d", values)


def _ids(line: _Line, key: str, values: Any, size: int) -> array[int]:
    fix = f"give {size} integers, as many as log-probs, or leave {key} out"
    if not isinstance(values, list) or len(values) != size:
        raise line.error(f"{key} {_shape(values)}, the log-probs have {size}", fix)
    try:
        return array("q", values)
    except (TypeError, OverflowError):
        raise line.error(f"{key} holds something else than token ids", fix) from None


def _shape(values: Any) -> str:
    return f"has {len(values)} entries" if isinstance(values, list) else f"is {_shown(values)}"


def _shown(value: Any, longest: int = 40) -> str:
    text = json.dumps(value)
    return text if len(text) <= longest else text[:longest] + "…"


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
    token_ids = _pad([row.token_ids for row in rows], torch.int64)
    stats = MismatchStats.from_log_probs(sampler, learner, mask, token_ids=token_ids)
    return _named(stats, torch.tensor([row.number for row in rows]))


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
