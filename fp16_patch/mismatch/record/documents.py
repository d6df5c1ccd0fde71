"""Reads a record's plan and ledger as data: what is of another type than it should be is left out and noted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp16_patch.plan.dtypes import torch_name
from fp16_patch.untrusted.paths import is_file, reason_of
from fp16_patch.untrusted.reading import Unreadable, read_json
from fp16_patch.untrusted.text import quoted

MAX_PLAN_BYTES, MAX_LEDGER_BYTES = 1 << 20, 1 << 24
MOST_NAMES = 256
"""Roles, quantities of a role, and dtypes of a quantity."""

_TEXTS = ("mode", "dtype", "model")

Ledger = dict[str, dict[str, list[str]]]


def read_plan(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return what the plan says; nothing where it cannot be read."""
    plan = _document(path, MAX_PLAN_BYTES, notes)
    wrong = [name for name in _TEXTS if not isinstance(plan.get(name, ""), str | None)]
    notes += [f"{path.name}: {name} is no text, and left out" for name in wrong]
    return {name: value for name, value in plan.items() if name not in wrong}


def read_ledger(path: Path, notes: list[str]) -> tuple[Ledger, int]:
    """Return role → quantity → dtypes, by torch's names, and how many processes answered."""
    document = _document(path, MAX_LEDGER_BYTES, notes)
    processes = document.get("processes", [])
    wrong = 0 if isinstance(processes, list) else 1
    processes = [] if wrong else processes
    tables = [document["roles"]] if document.get("roles") else [_roles_of(process) for process in processes]
    merged: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for role, quantity, dtype in (entry for table in tables for entry in _entries(table)):
        if not isinstance(dtype, str) or not _has_room(merged, role, quantity):
            wrong += 1
            continue
        merged[role][quantity].add(quoted(torch_name(dtype)))
    if wrong:
        notes.append(f"{path.name}: {wrong} entries are no dtypes, or too many, and left out")
    ledger = {role: {quantity: sorted(seen) for quantity, seen in row.items()} for role, row in merged.items()}
    return ledger, len(processes)


def _roles_of(process: object) -> object:
    return process.get("roles", {}) if isinstance(process, dict) else None


def _entries(table: object) -> Iterator[tuple[str, str, object]]:
    """Yield (role, quantity, dtype); None for a dtype where a dict or a list should be."""
    for role, row in table.items() if isinstance(table, dict) else [("", None)]:
        for quantity, dtypes in row.items() if isinstance(row, dict) else [("", None)]:
            for dtype in dtypes if isinstance(dtypes, list) else [None]:
                yield quoted(role), quoted(quantity), dtype


def _has_room(merged: dict[str, dict[str, set[str]]], role: str, quantity: str) -> bool:
    row = merged.get(role, {})
    has = len(merged) < MOST_NAMES or role in merged, len(row) < MOST_NAMES or quantity in row
    return all(has) and len(row.get(quantity, ())) < MOST_NAMES


def _document(path: Path, most: int, notes: list[str]) -> dict[str, Any]:
    if not is_file(path):
        return {}
    try:
        content = read_json(path, most)
    except OSError as problem:
        notes.append(f"{path.name} cannot be read, and is left out: {reason_of(problem)}")
        return {}
    except Unreadable:
        content = None
    if isinstance(content, dict):
        return content
    notes.append(f"{path.name} is not a whole JSON object, and left out")
    return {}
