"""Judges models by the configuration they are stored with: their quantization, and what their sampler says of them."""

from __future__ import annotations

from collections.abc import Iterator

from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import Plan
from fp16_patch.plan.stored_config import quantization_of, stored_config
from fp16_patch.samplers.sampler import Sampler


def model_conflicts(key: str, model: object, plan: Plan, *, sampler: Sampler | None) -> Iterator[Conflict]:
    """Yield why a model cannot be had under the plan, as far as its stored configuration tells.

    Args:
        key: the setting that names it.
        model: a folder, or a name on Hugging Face's hub; what is not on this machine is not judged.
        sampler: what serves it; None if nothing does.
    """
    if method := quantization_of(stored_config(model)):
        reason = f"the model is stored quantized ({method}), and would be {'served' if sampler else 'trained'} so"
        yield Conflict(key, model, reason, f"use its {plan.dtype} or bfloat16 weights")
    if sampler is not None:
        yield from sampler.model_conflicts(key, model, plan)
