"""Tells which families of models the installed vLLM refuses in float16."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.plan.stored_config import parts_of

# vLLM's table of the model types it refuses in float16, and where its releases keep it.
REFUSED = "_FLOAT16_NOT_SUPPORTED_MODELS"
_TABLES = ("vllm.config.model", "vllm.config")


def family_refused_in_float16(stored: Mapping[str, Any], sources: Sources | None = None) -> str | None:
    """Return the type of a model, or of one of its parts, that the installed vLLM refuses in float16; else None."""
    families = [str(part["model_type"]) for part in parts_of(stored) if part.get("model_type")]
    refused = refused_in_float16(sources or Installed()) if families else frozenset()
    return next((family for family in families if family in refused), None)


def refused_in_float16(sources: Sources) -> frozenset[str]:
    """Return the model types that vLLM refuses in float16, from its source: to import vLLM takes ten seconds.

    Empty if there is no vLLM, or no such table in it.
    """
    texts = filter(None, map(sources.read, _TABLES))
    return next((_keys(text) for text in texts if REFUSED in text), frozenset())


def _keys(source: str) -> frozenset[str]:
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if value is not None and any(isinstance(each, ast.Name) and each.id == REFUSED for each in targets):
            listed = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", ())
            return frozenset(str(each.value) for each in listed if isinstance(each, ast.Constant))
    return frozenset()
