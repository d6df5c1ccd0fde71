"""The prompts a probe samples from: a file's, or a few of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.untrusted.lines import lines_of
from fp16_patch.untrusted.paths import is_file, reason_of
from fp16_patch.untrusted.reading import Unreadable, json_of, opened
from fp16_patch.untrusted.text import quoted

# Names under which data sets keep the prompt, in the order in which they are tried.
KEYS = ("prompt", "messages", "input", "question", "problem", "text")

# For a model nobody gave prompts for: of several kinds, since what is extreme for one is not for another.
BUILT_IN = (
    "What is 17 times 23? Think step by step.",
    "Solve for x: 3x + 7 = 2x - 5.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey?",
    "Prove that the sum of two odd numbers is even.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "def quicksort(items):\n",
    "SELECT name, COUNT(*) FROM orders",
    "Explain in two sentences why the sky is blue.",
    "Translate to French: The meeting was moved to Thursday.",
    "List five countries in South America with their capitals.",
    "Once upon a time, in a village by the sea,",
    "The derivative of sin(x)·cos(x) is",
    '{"name": "Ada", "age": 36, "languages": [',
    "请用一句话介绍北京。",
    "¿Cuál es la raíz cuadrada de 1764?",
    "Summarize: The committee met twice, agreed on nothing, and adjourned until spring.",
)


MAX_LINE_BYTES = 2**20
"""Of one prompt, or one row of JSON."""
MAX_BLANK_LINES = 10_000
"""One after the other; a file that goes on so has no prompts."""
_KINDS = "give a .txt, .jsonl or .parquet file"


def read_prompts(path: Path | None, count: int, tokenizer: Any) -> list[list[int]]:
    """Return token ids of the file's first ``count`` prompts, from its start again if it has fewer.

    No more of the file is read than that, so that it may be as large as a data set.

    Args:
        path: lines of text, or JSON lines or parquet with one of ``KEYS``; chats go through the tokenizer's template.

    Raises:
        PlanError: there is no such file, it is none of these, or nothing to ask in it.
    """
    prompts = list(islice(_prompts_of(path), count)) if path is not None else list(BUILT_IN)
    if not prompts:
        raise _refused(path, "the file has no prompt", "give one prompt a line")
    try:
        encoded = [ids for prompt in prompts if (ids := _encode(prompt, tokenizer))]
    except Exception as problem:  # whatever a tokenizer, or the template that lies with it, raises
        reason = f"the tokenizer does not take them: {quoted(problem)}"
        raise _refused(path, reason, "give prompts as texts, or as messages with role and content") from problem
    if not encoded:
        raise _refused(path, "the tokenizer makes no token of them", "give prompts that are not empty")
    return list(islice(cycle(encoded), count))


def _refused(where: object, reason: str, fix: str) -> PlanError:
    return PlanError([Conflict("--prompts", where, reason, fix)])


def _prompts_of(path: Path) -> Iterator[Any]:
    if not is_file(path):
        raise _refused(path, "there is no such file", _KINDS)
    try:
        yield from _READERS.get(path.suffix, _lines)(path)
    except OSError as problem:
        raise _refused(path, reason_of(problem), "give a file that can be read") from problem


def _lines(path: Path) -> Iterator[str]:
    return (text for _, text in _numbered(path))


def _numbered(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line stands, and its text; those without any are left out."""
    blank = 0
    with opened(path) as file:
        for number, (_, line) in enumerate(lines_of(file, MAX_LINE_BYTES), start=1):
            where = f"{path}:{number}"
            if line is None:
                raise _refused(where, f"a line of more than {MAX_LINE_BYTES} bytes", f"shorten it, or {_KINDS}")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as problem:
                raise _refused(where, "not UTF-8 text", _KINDS) from problem
            blank = 0 if text.strip() else blank + 1
            if blank > MAX_BLANK_LINES:
                raise _refused(where, "nothing but blank lines", "give one prompt a line")
            if not blank:
                yield where, text


def _json_lines(path: Path) -> Iterator[Any]:
    for where, line in _numbered(path):
        try:
            row = json_of(line)
        except Unreadable as problem:
            raise _refused(where, str(problem), "one JSON object a line") from problem
        yield _prompt_in(row, where)


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = [key for key in KEYS if key in file.schema_arrow.names]
            batches = file.iter_batches(PARQUET_ROWS, columns=columns) if columns else ()
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield _prompt_in(row, f"{path}:{number}")
    except ArrowException as problem:
        raise _refused(path, f"not parquet: {quoted(problem)}", _KINDS) from problem
    if not columns:
        raise _refused(path, "no prompt in it", f"name a column one of {', '.join(KEYS)}")


PARQUET_ROWS = 64
"""Read at a time."""
_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}


def _prompt_in(row: Any, where: str) -> str | list[dict[str, Any]]:
    prompt = row
    if isinstance(row, dict):
        prompt = next((row[key] for key in KEYS if row.get(key) is not None), None)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt) and isinstance(row, dict):
        return prompt
    seen = "no prompt in it" if prompt is None or prompt is row else f"a prompt that is neither text nor chat: {prompt}"
    raise _refused(where, quoted(seen), f"use one of the keys {', '.join(KEYS)}")


def _encode(prompt: str | list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Encode a text as it is; a chat, a sequence of messages, by the tokenizer's template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(str(message.get("content", "")) for message in prompt))["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
