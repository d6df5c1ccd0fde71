"""The tables of what was planted, and of what reading takes, from `out/faults.json` and `out/reading.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def rows(results: Mapping[str, Any]) -> Iterator[str]:
    """What was planted on ranks and in the monitor, and what happened there."""
    yield from ("| planted | what happened, by rank | seconds |", "|---|---|---|")
    for planted, found in results["faults"].items():
        ranks = list(dict.fromkeys(found["ranks"]))
        words = ranks[0] if len(ranks) == 1 else "; ".join(found["ranks"])
        yield f"| {planted} | {_marked(words, found)} | {found['seconds']:.1f} |"


def _marked(words: str, found: Mapping[str, Any]) -> str:
    marks = [name.replace("_", " ") for name in ("reached_training", "silent") if found[name]]
    return " · ".join([words.replace("|", "\\|"), *(f"**{mark}**" for mark in marks)])


def reading(results: Mapping[str, Any]) -> Iterator[str]:
    """What the commands take for long records and large files."""
    yield from ("| reading | file | seconds of a core | memory at most |", "|---|---|---|---|")
    for name, figures in results.items():
        what = ", ".join(f"{count:,} {unit}" for unit in ("steps", "tokens") if (count := figures.get(unit)))
        command, file, memory = name.partition(" ")[0], figures["file_mb"], figures["peak_mb"]
        yield f"| `{command}`, {what} | {file:.0f} MB | {figures['seconds']:.0f} | {memory:.0f} MB |"
