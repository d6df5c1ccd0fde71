"""How far a probe is, on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[int], None]
Phases = Callable[[str, int | None], AbstractContextManager[Advance]]
"""Opens a phase by its name and the number of its parts, None where that is not known."""


@contextmanager
def on_terminal(console: Console) -> Iterator[Phases]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:

        @contextmanager
        def phase(name: str, total: int | None) -> Iterator[Advance]:
            task = bars.add_task(name, total=total)
            yield lambda parts: bars.advance(task, parts)
            # A phase may end early: all responses were over.
            bars.update(task, total=total or 1, completed=total or 1)

        yield phase


@contextmanager
def silent(name: str, total: int | None) -> Iterator[Advance]:
    yield lambda parts: None
