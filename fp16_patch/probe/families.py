"""What is known of a model's family: `families.toml`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FAMILIES = Path(__file__).with_name("families.toml")


@dataclass(frozen=True)
class Family:
    """Why FP16 is a risk for a family of models.

    Attributes:
        model_type: as in the model's `config.json`.
        why: what was seen, by whom.
        refused: vLLM does not serve it in float16.
    """

    model_type: str
    why: str
    sources: tuple[str, ...]
    refused: bool = False

    def __str__(self) -> str:
        return f"{self.model_type}: {self.why} ({', '.join(self.sources)})"


@cache
def _families() -> dict[str, Any]:
    with FAMILIES.open("rb") as file:
        return tomllib.load(file)


def known_risk(model_type: str) -> Family | None:
    entry = _families().get(model_type)
    if entry is None:
        return None
    return Family(model_type, entry["why"], tuple(entry["sources"]), entry.get("refused", False))
