"""What a checkpoint holds of a loss scaler and of the steps it was used in, read as data: names, types, ranges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp16_patch.plan.settings import HIGHEST_SCALE, LOWEST_SCALE, MOST_STEPS
from fp16_patch.untrusted.reading import Unreadable
from fp16_patch.untrusted.text import quoted

_MOST_LISTED = 4
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a saved value has to be: of one of these types, a bool being no number, and between these ends."""

    types: tuple[type, ...]
    least: float
    most: float
    text: str

    def holds(self, value: object) -> bool:
        return type(value) in self.types and self.least <= value <= self.most  # type: ignore[operator]


SCALE = Kind((int, float), LOWEST_SCALE, HIGHEST_SCALE, "a loss scale")
COUNT = Kind((int,), 0, 2**53, "a count")
COUNT_OR_BEFORE = Kind((int,), -1, MOST_STEPS, "a count of steps")
"""Also -1: of a step that is still to come, or of one that never was."""
FLAG = Kind((bool,), False, True, "true or false")

TORCH_SCALER = {"scale": SCALE, "_growth_tracker": COUNT_OR_BEFORE}
"""What goes into torch's `GradScaler.load_state_dict`."""

DEEPSPEED_SCALER = {
    "cur_scale": SCALE,
    "cur_iter": COUNT,
    "last_overflow_iter": COUNT_OR_BEFORE,
    "cur_hysteresis": COUNT,
}
"""Attributes of DeepSpeed's `DynamicLossScaler`."""

HISTORY = {
    "attempted": COUNT,
    "skipped_total": COUNT,
    "consecutive_skips": COUNT,
    "taken_since_lr": FLAG,
    "retries_since_lr": COUNT,
    "retries_total": COUNT,
}
"""Attributes of `StepHistory`; a state that was saved before there was one of them goes without."""


@dataclass(frozen=True)
class SavedState:
    """What was found of it, which may be a part.

    Attributes:
        problems: what cannot be used, a file for one → why.
    """

    scaler: Values | None = None
    history: Values | None = None
    problems: Mapping[str, str] = field(default_factory=dict)

    def listed_problems(self) -> str:
        listed = [f"{quoted(what)}: {why}" for what, why in self.problems.items()]
        more = [f"and {len(listed) - _MOST_LISTED} more"] if len(listed) > _MOST_LISTED else []
        return "; ".join(listed[:_MOST_LISTED] + more)


def values_of(content: Any, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the values that these names have in what was saved; it may hold others.

    Raises:
        Unreadable: one is missing, or not of its kind.
    """
    if not isinstance(content, Mapping):
        raise Unreadable(f"it holds {_shown(content)} in the place of names and values")
    for name, kind in kinds.items():
        if name not in content:
            raise Unreadable(f"it has no {name}")
        if not kind.holds(content[name]):
            raise Unreadable(f"its {name} is {_shown(content[name])}, which is not {kind.text}")
    return {name: content[name] for name in kinds}


def history_of(content: Any) -> dict[str, Any]:
    """Return the attributes of a `StepHistory` that were saved.

    Raises:
        Unreadable: one is not of its kind, or they contradict each other.
    """
    saved = content if isinstance(content, Mapping) else {}
    present = {name: kind for name, kind in HISTORY.items() if name in saved}
    history = values_of(content, present)
    if not history.get("consecutive_skips", 0) <= history.get("skipped_total", 0) <= history.get("attempted", 0):
        raise Unreadable("it counts more skipped steps than steps")
    return history


def write_whole(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that whoever reads it finds the old one or the new one.

    Raises:
        OSError: it cannot be written, and there is none of a part.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def is_scale(value: object) -> bool:
    """Return whether a scaler can use it: a positive number that, like its reciprocal, is a normal one of FP32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and SCALE.least <= value <= SCALE.most


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
