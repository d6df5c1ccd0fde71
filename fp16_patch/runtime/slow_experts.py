"""Tells which models' experts a learner computes slowly in the plan's dtype.

transformers computes the experts of a layer by torch's `grouped_mm`: on CUDA one kernel for bfloat16, and for any other
dtype a loop over the experts, for whose sizes the host waits in every layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.plan.dtypes import BFLOAT16
from fp16_patch.plan.plan import Plan

# What transformers puts before such experts.
_DECORATOR = "use_experts_implementation"


def slow_experts(models: Iterable[tuple[str, object]], plan: Plan, sources: Sources | None = None) -> Iterator[str]:
    """Yield a sentence for each model whose experts are slow under a plan.

    Args:
        models: key of the setting, and the model's folder that it names; what is on a hub is passed over.
        sources: transformers'; by default the installed one's.
    """
    if not plan.overrides_dtype or plan.dtype == BFLOAT16.torch:
        return
    for key, model in models:
        if kind := _kind_with_experts(model, sources or Installed()):
            yield (
                f"{key}: the learner computes the experts of {kind} one after another in {plan.dtype}, and waits for "
                "the host in every layer; torch's grouped_mm is one kernel in bfloat16 only"
            )


def _kind_with_experts(model: object, transformers: Sources) -> str | None:
    path = Path(str(model)).expanduser() / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kinds = [part["model_type"] for part in (config, config.get("text_config") or {}) if "model_type" in part]
    return next((kind for kind in kinds if _DECORATOR in _modeling_code(kind, transformers)), None)


def _modeling_code(kind: Any, transformers: Sources) -> str:
    return transformers.read(f"transformers.models.{kind}.modeling_{kind}") or ""
