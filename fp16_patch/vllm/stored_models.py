"""Judges models by the configuration they are stored with: their family in float16, their quantization."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.plan.dtypes import torch_name
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import MODE_ENV, Plan

CONFIG = "config.json"
QUANTIZATIONS = ("quantization_config", "compression_config")
_EXPORTED = "hf_quant_config.json"  # where NVIDIA's exporter writes it, and vLLM reads it, if CONFIG has none
# vLLM's table of the model types it refuses in float16, and where its releases keep it.
REFUSED = "_FLOAT16_NOT_SUPPORTED_MODELS"
_TABLES = ("vllm.config.model", "vllm.config")


def model_conflicts(key: str, model: object, plan: Plan, *, sampled: bool) -> Iterator[Conflict]:
    """Yield why a model cannot be had under the plan, as far as its stored configuration tells.

    Args:
        key: the setting that names it.
        model: a folder, or a name on Hugging Face's hub; what is not on this machine is not judged.
        sampled: whether vLLM serves it.
    """
    stored = stored_config(model)
    if method := quantization_of(stored):
        reason = f"the model is stored quantized ({method}), and would be {'served' if sampled else 'trained'} so"
        yield Conflict(key, model, reason, f"use its {plan.dtype} or bfloat16 weights")
    if sampled and plan.scales_loss and (family := family_refused_in_float16(stored)):
        reason = f"vLLM refuses models of type {family} in float16: their activations leave its range"
        yield Conflict(key, model, reason, f"use another model, or {MODE_ENV}=bf16")


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
    parts = _parts(stored_config(model))
    return next((torch_name(part[name]) for part in parts for name in ("dtype", "torch_dtype") if part.get(name)), None)


def quantization_of(stored: Mapping[str, Any]) -> str | None:
    """Return the method a model is quantized by, in any of its parts; None if it is not."""
    found = (part[name] for part in _parts(stored) for name in QUANTIZATIONS if part.get(name))
    settings = next(found, None)
    if settings is None:
        return None
    named = settings if isinstance(settings, Mapping) else {}
    return str(named.get("quant_method") or named.get("quant_algo") or "unknown method")


def family_refused_in_float16(stored: Mapping[str, Any], sources: Sources | None = None) -> str | None:
    """Return the type of a model, or of one of its parts, that the installed vLLM refuses in float16; else None."""
    families = [str(part["model_type"]) for part in _parts(stored) if part.get("model_type")]
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


def _parts(stored: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and those nested in it, such as `text_config`."""
    yield stored
    for name, value in stored.items():
        if isinstance(value, Mapping) and name.endswith("_config") and name not in QUANTIZATIONS:
            yield from _parts(value)


def _folder(model: str) -> Path:
    """Return where a model lies: the folder itself, or the newest snapshot of the hub's cache."""
    folder = Path(model).expanduser()
    if folder.is_dir() or model.count("/") != 1:
        return folder
    cached = _hub_cache() / f"models--{model.replace('/', '--')}"
    head = cached / "refs" / "main"
    return cached / "snapshots" / head.read_text(encoding="utf-8").strip() if head.is_file() else folder


def _hub_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the framework says what is wrong with it
    return dict(read) if isinstance(read, dict) else {}
