"""The prompts a probe samples from: a file's, or a few of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from fp16_patch.plan.errors import Conflict, PlanError

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


def read_prompts(path: Path | None, count: int, tokenizer: Any) -> list[list[int]]:
    """Return token ids of the file's first ``count`` prompts, from its start again if it has fewer.

    Args:
        path: lines of text, or JSON lines or parquet with one of ``KEYS``; chats go through the tokenizer's template.

    Raises:
        PlanError: there is no such file, or nothing to ask in it.
    """
    prompts = list(islice(_prompts_of(path), count)) if path is not None else list(BUILT_IN)
    if not prompts:
        raise PlanError([Conflict("--prompts", path, "the file has no prompt", "give one prompt a line")])
    encoded = [_encode(prompt, tokenizer) for prompt in prompts]
    return list(islice(cycle([ids for ids in encoded if ids]), count))


def _prompts_of(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise PlanError([Conflict("--prompts", path, "there is no such file", "give a .txt, .jsonl or .parquet file")])
    return _READERS.get(path.suffix, _lines)(path)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        yield from (line.rstrip("\n") for line in lines if line.strip())


def _json_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            yield _prompt_in(json.loads(line), f"{path}:{number}")
        except json.JSONDecodeError as problem:
            fix = "one JSON object a line"
            raise PlanError([Conflict("--prompts", f"{path}:{number}", f"not JSON: {problem}", fix)]) from problem


def _parquet(path: Path) -> Iterator[Any]:
    import pandas

    for number, row in enumerate(pandas.read_parquet(path).to_dict("records"), start=1):
        yield _prompt_in(row, f"{path}:{number}")


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}


def _prompt_in(row: Any, where: str) -> Any:
    if isinstance(row, str):
        return row
    for key in KEYS:
        if isinstance(row, dict) and row.get(key) is not None:
            return row[key]
    raise PlanError([Conflict("--prompts", where, "no prompt in it", f"use one of the keys {', '.join(KEYS)}")])


def _encode(prompt: Any, tokenizer: Any) -> list[int]:
    """Encode a text as it is; a chat, a sequence of messages, by the tokenizer's template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    messages = [dict(message) for message in prompt]
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(str(message.get("content", "")) for message in messages))["input_ids"])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
