"""Tells which models' experts a learner computes slowly in the plan's dtype.

transformers computes the experts of a layer by torch's `grouped_mm`: on CUDA one kernel for bfloat16, and for any other
dtype a loop over the experts, for whose sizes the host waits in every layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.plan.dtypes import BFLOAT16
from fp16_patch.plan.plan import Plan
from fp16_patch.plan.stored_config import parts_of, stored_config

# What transformers puts before such experts.
_DECORATOR = "use_experts_implementation"


def slow_experts(models: Iterable[tuple[str, object]], plan: Plan, sources: Sources | None = None) -> Iterator[str]:
    """Yield a sentence for each model whose experts are slow under a plan.

    Args:
        models: key of the setting, and the model that it names; one that is not on this machine is passed over.
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
    kinds = [str(part["model_type"]) for part in parts_of(stored_config(model)) if part.get("model_type")]
    return next((kind for kind in kinds if _DECORATOR in _modeling_code(kind, transformers)), None)


def _modeling_code(kind: str, transformers: Sources) -> str:
    return (transformers.read(f"transformers.models.{kind}.modeling_{kind}") or "") if kind.isidentifier() else ""
