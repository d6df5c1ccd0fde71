"""Runs of verl for a bench start warm: what differs between its arms is not how a process came to its imports."""

from __future__ import annotations

from pathlib import Path

from integration.bench.ranks import STOCK, cpu_environment
from integration.cpu.warm.servers import IMPORTS, of_this_process


def warm_python() -> Path:
    """Return the executable that stands for `python` in runs of verl, until this process ends."""
    return of_this_process().server(IMPORTS, cpu_environment(STOCK)).interpreter
