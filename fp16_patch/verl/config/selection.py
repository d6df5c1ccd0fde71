"""Reads settings of a composed configuration by their keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Select = Callable[[str], Any]
"""The value of a key in a run's configuration; None where there is none."""


def select(config: Any, key: str) -> Any:
    """Return the value of a dotted key; None where there is none."""
    from omegaconf import OmegaConf

    return OmegaConf.select(config, key, default=None)
