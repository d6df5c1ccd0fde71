"""LoRA's weight sync: adapters merged on the way to the sampler, under the names the sampler knows.

OpenRLHF sends a PEFT model's parameters as they are called there, which vLLM refuses, in every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fp16_patch.plan.errors import Conflict, PlanError

_PREFIX = "base_model.model."
_BASE = ".base_layer."
_ADAPTER = ".lora_"


def broadcast_to_vllm(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`ActorPPOTrainer.broadcast_to_vllm`: let a PEFT model show its merged weights while it is called."""
    from peft import PeftModel

    model = trainer.actor.model.module
    if not isinstance(model, PeftModel):
        return wrapped(*args, **kwargs)
    model.named_parameters = lambda: merged_parameters(model)
    try:
        return wrapped(*args, **kwargs)
    finally:
        del model.named_parameters


class MergedWeight:
    """A base weight with its adapters added, computed when it is read: only one is in memory at a time.

    Attributes:
        data: the merged weight, added up in float32 and rounded once to the base weight's dtype.
    """

    requires_grad = True

    def __init__(self, layer: Any, weight: torch.nn.Parameter) -> None:
        self._layer, self._weight = layer, weight
        self.shape, self.dtype = weight.shape, weight.dtype

    @property
    def data(self) -> torch.Tensor:
        merged = self._weight.data.float()
        for adapter in self._layer.active_adapters:
            if adapter in self._layer.lora_A:
                merged += self._delta(adapter)
        return merged.to(self.dtype)

    def _delta(self, adapter: str) -> torch.Tensor:
        down, up = self._layer.lora_A[adapter].weight.data, self._layer.lora_B[adapter].weight.data
        delta = self._layer.scaling[adapter] * (up.float() @ down.float())
        return delta.T if self._layer.fan_in_fan_out else delta


def merged_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield name in the base model, and weight, of everything a sampler holds."""
    from peft.tuners.lora import Linear, LoraLayer

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    layers = {name: module for name, module in adapted.items() if isinstance(module, Linear)}
    if others := sorted(adapted.keys() - layers.keys()):
        reason = "adapters of these layers cannot be merged for the sampler"
        raise PlanError([Conflict("--ds.lora.target_modules", others[0], reason, "use linear layers: all-linear")])
    for name, parameter in type(model).named_parameters(model):
        if _ADAPTER in name:
            continue
        layer, is_base, kind = name.rpartition(_BASE)
        merges = is_base and kind == "weight" and layer in layers
        plain = name.removeprefix(_PREFIX).replace(_BASE, ".")
        yield plain, MergedWeight(layers[layer], parameter) if merges else parameter
