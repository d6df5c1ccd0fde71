"""vLLM, as a plan sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import MODE_ENV, Plan
from fp16_patch.plan.stored_config import stored_config
from fp16_patch.samplers.arguments import (
    Judge,
    overridden,
    overridden_downwards,
    overridden_unless_auto,
    quantized,
    spelled,
    spoilt,
)
from fp16_patch.samplers.interface import Interface
from fp16_patch.samplers.sampler import Sampler
from fp16_patch.vllm.expert_communication import ARGUMENT, environment_conflicts, expert_communication_conflict
from fp16_patch.vllm.stored_models import family_refused_in_float16


def _unknown_processes(value: object, plan: Plan) -> str | None:
    return None if value in (None, "mp") else "its workers are not processes we know how to ask"


_JUDGES: dict[str, Judge] = {
    "dtype": overridden,
    "kv_cache_dtype": overridden_unless_auto,
    "mamba_cache_dtype": overridden_downwards,
    "mamba_ssm_cache_dtype": overridden_downwards,
    "quantization": quantized,
    "distributed_executor_backend": _unknown_processes,
}


class Vllm(Sampler):
    """vLLM's V1 engine."""

    name: ClassVar = "vllm"
    interface: ClassVar = Interface("vllm")
    plugins: ClassVar = "VLLM_PLUGINS"
    renormalizes: ClassVar = True
    log_prob_setting: ClassVar = ("logprobs_mode", "processed_logprobs")

    def argument_conflicts(self, key: str, arguments: Mapping[str, Any], plan: Plan) -> Iterator[Conflict]:
        yield from spoilt(key, arguments, _JUDGES, plan)
        for argument, value in arguments.items():
            if spelled(argument) == ARGUMENT and (
                other := expert_communication_conflict(f"{key}.{argument}", value, plan)
            ):
                yield other

    def environment_conflicts(self, plan: Plan) -> Iterator[Conflict]:
        return environment_conflicts(plan)

    def model_conflicts(self, key: str, model: object, plan: Plan) -> Iterator[Conflict]:
        if plan.scales_loss and (family := family_refused_in_float16(stored_config(model))):
            reason = f"vLLM refuses models of type {family} in float16: their activations leave its range"
            yield Conflict(key, model, reason, f"use another model, or {MODE_ENV}=bf16")


VLLM = Vllm()
