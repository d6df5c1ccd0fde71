"""Reads the sequences that one line of a dump holds, and says what is wrong with one that cannot be compared."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.report.dialects import Dialect, Spoken, problem_with, spoken
from fp16_patch.plan.errors import Fp16PatchError
from fp16_patch.untrusted.lines import json_of_line
from fp16_patch.untrusted.reading import Unreadable
from fp16_patch.untrusted.text import printable, quoted

UNKNOWN_TOKEN = -1
MOST = 1 << 53
"""Above this, whole numbers are no longer exact where they are kept."""

_SHAPES = "give each field as a list of n numbers, a sequence, or all of them as lists of as many such lists"


class DumpError(Fp16PatchError, ValueError):
    """Says which line cannot be compared, and why.

    Args:
        path, line: where, lines counted from 1; ``line`` is None for a whole file.
        problem: what is wrong.
        fix: what to change.
    """

    def __init__(self, path: Path, line: int | None, problem: str, fix: str) -> None:
        self.arguments = (path, line, problem, fix)
        shown = quoted(path)
        where = shown if line is None else f"{shown}, line {line}"
        super().__init__(f"{where}: {problem}. Fix: {fix}")

    def __reduce__(self) -> tuple[type[DumpError], tuple[Path, int | None, str, str]]:
        return type(self), self.arguments


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line is, in what is said about it."""

    file: Path
    number: int

    def error(self, problem: str, fix: str) -> DumpError:
        return DumpError(self.file, self.number, problem, fix)


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: its tokens' log-probs on both sides, which of them were sampled, and their ids.

    ``number`` is what the file calls the sequence; None if it does not.
    """

    place: Place
    keys: Spoken
    step: int
    number: int | None
    sampler: array[float]
    learner: array[float]
    mask: array[float]
    token_ids: array[int]


def rows_of(place: Place, text: bytes, known: Sequence[Dialect], given: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the line's sequences: one, or as many as its fields have lists.

    Raises:
        DumpError: it is no object, lacks a side, or its fields do not fit together.
    """
    content = _object(place, text)
    keys = spoken(content, known)
    if keys is None:
        raise place.error(*problem_with(content, known, given))
    fields = [name for name in (keys.sampler, keys.learner, keys.mask, keys.token_ids) if name is not None]
    nested = [name for name in fields if _is_nested(content[name])]
    if not nested:
        yield _row(place, keys, content)
        return
    count = len(content[nested[0]])
    if any(not isinstance(content[name], list) or len(content[name]) != count for name in fields) or fields != nested:
        shapes = "; ".join(f"{name} is {_shape(content[name])}" for name in fields)
        raise place.error(f"the shapes do not fit together: {shapes}", _SHAPES)
    for index in range(count):
        shared = {name: _of_sequence(content.get(name), index, count) for name in ("step", "sequence")}
        yield _row(place, keys, shared | {name: content[name][index] for name in fields})


def _is_nested(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and isinstance(values[0], list)


def _of_sequence(value: Any, index: int, count: int) -> Any:
    return value[index] if isinstance(value, list) and len(value) == count else value


def _object(place: Place, text: bytes) -> dict[str, Any]:
    try:
        content = json_of_line(text)
    except Unreadable as problem:
        fix = "write one JSON object a line; leave out a last line that a killed run did not finish"
        raise place.error(str(problem), fix) from problem
    if not isinstance(content, dict):
        raise place.error(f"a JSON {type(content).__name__}, not an object", "write one JSON object a line")
    return content


def _row(place: Place, keys: Spoken, content: Mapping[str, Any]) -> Row:
    sampler, learner = (_log_probs(place, key, content[key]) for key in (keys.sampler, keys.learner))
    if keys.missing is not None:
        sampler = array("d", (math.nan if value == keys.missing else value for value in sampler))
    size = len(sampler)
    if size != len(learner):
        problem = f"{keys.sampler} has {size} entries, {keys.learner} has {len(learner)}"
        raise place.error(problem, "give both sides' log-probs of the same tokens, in the same order")
    return Row(
        place,
        keys,
        step=_step(place, content.get("step")),
        number=_number(content.get("sequence")),
        sampler=sampler,
        learner=learner,
        mask=array("d", [1]) * size if keys.mask is None else _mask(place, keys.mask, content[keys.mask], size),
        token_ids=array("q", [UNKNOWN_TOKEN]) * size
        if keys.token_ids is None
        else _ids(place, keys.token_ids, content[keys.token_ids], size),
    )


def _integer(value: Any) -> int | None:
    """Return a number that is whole, however it is written; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _number(value: Any) -> int | None:
    number = _integer(value)
    return number if number is not None and 0 <= number < MOST else None


def _step(place: Place, value: Any) -> int:
    step = 0 if value is None else _integer(value)
    if step is None or abs(step) >= MOST:
        raise place.error(f"step is {_shown(value)}", "give the number of the training step, an integer")
    return step


def _log_probs(place: Place, key: str, values: Any) -> array[float]:
    if not isinstance(values, list):
        raise place.error(f"{key} is {_shown(values)}", "give a list of numbers, one a token")
    try:
        return array("d", values)  # fast, and refuses null and strings
    except (TypeError, OverflowError):
        return array("d", (_log_prob(place, key, index, value) for index, value in enumerate(values)))


def _log_prob(place: Place, key: str, index: int, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        fix = "give a number, or null, NaN or an infinity for what is not finite"
        fix = f"{fix}; {_SHAPES}" if isinstance(value, list) else fix
        raise place.error(f"{key}[{index}] is {_shown(value)}", fix) from None


def _mask(place: Place, key: str, values: Any, size: int) -> array[float]:
    fix = f"give {size} of 0 and 1, as many as log-probs: 1 for a sampled token"
    if not isinstance(values, list) or len(values) != size:
        raise place.error(f"{key} {_count(values)}, the log-probs have {size}", fix)
    if not _is_mask(values):
        raise place.error(f"{key} has {_shown(next(value for value in values if value not in (0, 1)))} in it", fix)
    return array("d", values)


def _is_mask(values: list[Any]) -> bool:
    try:
        return {*values} <= {0, 1}
    except TypeError:  # a list or a dict has no hash
        return False


def _ids(place: Place, key: str, values: Any, size: int) -> array[int]:
    fix = f"give {size} integers, as many as log-probs, or leave {key} out"
    if not isinstance(values, list) or len(values) != size:
        raise place.error(f"{key} {_count(values)}, the log-probs have {size}", fix)
    ids = values if {*map(type, values)} <= {int} else [_integer(value) for value in values]
    if ids and (None in ids or not -MOST < min(ids) <= max(ids) < MOST):
        raise place.error(f"{key} holds something else than token ids", fix)
    return array("q", ids)


def _count(values: Any) -> str:
    return f"has {len(values)} entries" if isinstance(values, list) else f"is {_shown(values)}"


def _shape(values: Any) -> str:
    if not isinstance(values, list):
        return _shown(values)
    return f"a list of {len(values)} {'lists' if _is_nested(values) else 'numbers'}"


def _shown(value: Any, longest: int = 40) -> str:
    try:
        text = printable(json.dumps(value))
    except RecursionError:
        text = "nested too deep"
    return text if len(text) <= longest else text[:longest] + "…"
