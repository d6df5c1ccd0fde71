"""Weights on their way to the sampler: FP32 masters, rounded once by the sampler, never through bfloat16."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fp16_patch.activation import current_plan, ledger
from fp16_patch.verl.engine import role_of

_FSDP_ENGINE = "verl.workers.engine.fsdp.transformer_impl"


def merged_lora_weights(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """`FSDPEngine._merged_lora_per_tensor_param`: base plus adapter, as they are.

    As on verl's plain path: the sampler rounds each weight to the dtype it has there, and a few have none but FP32.
    """
    if not current_plan().changes:
        return wrapped(*args, **kwargs)  # type: ignore[no-any-return]
    return _merged(engine)


def _merged(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    verl = import_module(_FSDP_ENGINE)
    try:
        # The merged weights live only inside the context, so each one is copied before the next is asked for.
        with verl.merged_lora_context(engine.module, backup_adapters=True):
            weights = verl.normalize_peft_param_name(engine.module.state_dict())
            root = getattr(engine.module, "_fsdp_wrapped_module", engine.module)
            for name, weight in verl.convert_weight_keys(weights, root).items():
                sent = _copy_to_send(weight, verl.get_device_id())
                ledger().note(role_of(engine), "wire", sent.dtype)
                yield name, sent
    finally:
        if engine._is_offload_param:
            verl.offload_fsdp_model_to_cpu(engine.module)


def _copy_to_send(weight: torch.Tensor, device: Any) -> torch.Tensor:
    if isinstance(weight, DTensor):
        return weight.to(device, non_blocking=True).full_tensor().detach()
    return weight.detach().clone()


def new_checkpoint_engine(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`CheckpointEngineRegistry.new`: engines that cast weights (mooncake, kimi) cast to the plan's dtype.

    Their `rollout_dtype` is bfloat16 by default and cannot be set from YAML: a string is taken for a device.
    """
    plan = current_plan()
    backend = kwargs.get("backend", args[0] if args else None)
    if plan.changes and "rollout_dtype" in inspect.signature(_engine_class(backend)).parameters:
        kwargs = {**kwargs, "rollout_dtype": plan.torch_dtype}
    return wrapped(*args, **kwargs)


def _engine_class(backend: Any) -> type:
    registry = import_module("verl.checkpoint_engine.base").CheckpointEngineRegistry
    return registry.get(backend)  # type: ignore[no-any-return]
