"""What a model's `config.json` says of it, read where the model lies on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp16_patch.plan.dtypes import torch_name
from fp16_patch.untrusted.paths import from_home, is_folder
from fp16_patch.untrusted.reading import Unreadable, read_bytes, read_json

CONFIG = "config.json"
QUANTIZATIONS = ("quantization_config", "compression_config")
MAX_BYTES = 16 * 2**20
"""Of a configuration."""
_MAX_NAME_BYTES = 4096
_EXPORTED = "hf_quant_config.json"  # where NVIDIA's exporter writes it, and vLLM reads it, if CONFIG has none


def stored_config(model: object) -> dict[str, Any]:
    """Return what a model's `config.json` says; empty if it is not on this machine, or no configuration."""
    if model is None:
        return {}
    folder = _folder(str(model))
    stored = _json(folder / CONFIG)
    if stored and quantization_of(stored) is None and (exported := _json(folder / _EXPORTED).get("quantization")):
        return {**stored, QUANTIZATIONS[0]: exported}
    return stored


def stored_dtype(model: object) -> str | None:
    """Return the dtype, by torch's name, that a model's configuration says it is stored in; None if it does not say."""
    parts = parts_of(stored_config(model))
    return next((torch_name(part[name]) for part in parts for name in ("dtype", "torch_dtype") if part.get(name)), None)


def quantization_of(stored: Mapping[str, Any]) -> str | None:
    """Return the method a model is quantized by, in any of its parts; None if it is not."""
    found = (part[name] for part in parts_of(stored) for name in QUANTIZATIONS if part.get(name))
    settings = next(found, None)
    if settings is None:
        return None
    named = settings if isinstance(settings, Mapping) else {}
    return str(named.get("quant_method") or named.get("quant_algo") or "unknown method")


def parts_of(stored: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and those nested in it, such as `text_config`, however deep they are."""
    left = [stored]
    while left:
        part = left.pop()
        yield part
        left += [value for name, value in reversed([*part.items()]) if isinstance(value, Mapping) and _is_part(name)]


def _is_part(name: object) -> bool:
    return str(name).endswith("_config") and name not in QUANTIZATIONS


def _folder(model: str) -> Path:
    """Return where a model lies: the folder itself, or the newest snapshot of the hub's cache."""
    folder = from_home(model)
    if is_folder(folder) or model.count("/") != 1:
        return folder
    cached = _hub_cache() / f"models--{model.replace('/', '--')}"
    head = cached / "refs" / "main"
    try:
        return cached / "snapshots" / read_bytes(head, _MAX_NAME_BYTES).decode("utf-8").strip()
    except (OSError, ValueError):
        return folder


def _hub_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    return from_home(os.environ.get("HF_HUB_CACHE", f"{home}/hub"))


def _json(path: Path) -> dict[str, Any]:
    try:
        read = read_json(path, MAX_BYTES)
    except (OSError, Unreadable):
        return {}  # the framework says what is wrong with it
    return dict(read) if isinstance(read, dict) else {}
