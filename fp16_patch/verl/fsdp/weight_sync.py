"""Weights on their way to the sampler: FP32 masters, rounded once to what they are there, never through bfloat16."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.runtime.fp32_weights import Kept, end_of, stays, unmatched
from fp16_patch.verl.fsdp.engine import role_of

logger = logging.getLogger(__name__)

_FSDP_ENGINE = "verl.workers.engine.fsdp.transformer_impl"
_SLOT = "_fp16_patch_weight_sync"
Weights = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class _Rounding:
    """The dtype in which weights are sent: `dtype`, unless the sampler keeps one in another."""

    dtype: torch.dtype
    kept: Kept
    sent_ends: frozenset[str]

    @property
    def rounds_all(self) -> bool:
        """Return whether no weight stays as it is, so that no name needs to be known."""
        return self.dtype != torch.float32 and not any(stays(end, self.kept) for end in self.sent_ends)

    def of(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as it is sent."""
        if weight.dtype not in (torch.float32, self.dtype) or stays(name, self.kept):
            return weight
        # Transports pack weights end to end and view them in place, so an FP32 one must not follow half of four bytes.
        return weight.to(torch.float32 if weight.numel() % 2 else self.dtype)


@dataclass
class _WeightSync:
    """What an engine's syncs have shown so far.

    Attributes:
        sent_ends: how the names of the weights end that its last sync sent.
        rounding: what was decided once that was known, and what the samplers keep.
    """

    sent_ends: frozenset[str] | None = None
    rounding: _Rounding | None = None


_AS_THEY_ARE = _Rounding(torch.float32, {"parameters": [], "buffers": []}, frozenset())


def per_tensor_param(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`get_per_tensor_param` of the FSDP engine and VeOmni's: send each weight in the dtype that it has in the sampler.

    vLLM's loaders copy a weight into its parameter before anything else, and so would round it to the same; an FP32
    wire is twice as long. Until the driver has told what the samplers keep, and one sync has told what is sent,
    weights go out as they are.
    """
    if current_plan().overrides_dtype and _loses_adapters(engine):
        import_module(_FSDP_ENGINE).load_fsdp_model_to_gpu(engine.module)
        return _sent(engine, _merged(engine), _rounding_of(engine)), None
    weights, adapter = wrapped(*args, **kwargs)
    # Adapters have a dtype of their own in the sampler, and a quantizer makes of the base what it needs.
    # VeOmni's engine has no quantizer.
    quantizes = getattr(engine, "_qat_enabled", False)
    if not current_plan().overrides_dtype or adapter is not None or quantizes:
        return weights, adapter
    return _sent(engine, weights, _rounding_of(engine)), adapter


def _loses_adapters(engine: Any) -> bool:
    """Return whether verl merges adapters and takes them out again before it reads the weights, as 0.8.0 does."""
    merges = _is_merging(engine) and engine.model_config.lora.get("merge", False)
    return merges and not hasattr(engine, "_merged_lora_per_tensor_param")


def _sent(engine: Any, weights: Iterable[tuple[str, torch.Tensor]], rounding: _Rounding) -> Weights:
    ends = set()
    if rounding.rounds_all and not _is_merging(engine):
        weights = _rounded_before_gathering(weights, rounding.dtype)
    for name, weight in weights:
        ends.add(end_of(name))
        sent = rounding.of(name, weight)
        if sent.is_floating_point():
            ledger().note(role_of(engine), "wire", sent.dtype)
        yield name, sent
    _sync_of(engine).sent_ends = frozenset(ends)


def _sync_of(engine: Any) -> _WeightSync:
    if not hasattr(engine, _SLOT):
        setattr(engine, _SLOT, _WeightSync())
    return getattr(engine, _SLOT)  # type: ignore[no-any-return]


def _rounding_of(engine: Any) -> _Rounding:
    """Return what was decided at the first sync for which enough was known."""
    kept, sync = ledger().sampler_keeps, _sync_of(engine)
    if sync.rounding is None and kept is not None and sync.sent_ends is not None:
        sync.rounding = _decided(engine, kept, sync.sent_ends)
    return sync.rounding or _AS_THEY_ARE


def _decided(engine: Any, kept: Kept, sent_ends: frozenset[str]) -> _Rounding:
    plan = current_plan()
    if unknown := unmatched(kept, sent_ends):
        _say(engine, f"in FP32: it keeps {', '.join(unknown)} in another dtype, and no weight is called so")
        return _AS_THEY_ARE
    rounding = _Rounding(plan.torch_dtype, kept, sent_ends)
    keeping = sorted(end for end in sent_ends if stays(end, kept))
    _say(engine, f"in {plan.dtype}" + (f", but {', '.join(keeping)} as it is" if keeping else ""))
    return rounding


def _say(engine: Any, how: str) -> None:
    if engine.rank == 0:
        logger.info("from now on weights are sent to the sampler %s", how)


def _rounded_before_gathering(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Weights:
    """Yield the same weights, whose shards are gathered in `dtype`: each is made when it is asked for."""
    remaining = iter(weights)
    while True:
        # Not around what the receiver of a weight does with it.
        with _RoundedShards(dtype):
            item = next(remaining, None)
        if item is None:
            return
        yield item


class _RoundedShards(TorchFunctionMode):  # type: ignore[misc]  # torch has no types for it
    """Rounds FP32 shards that are taken to the device, too."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and isinstance(result, DTensor) and result.dtype == torch.float32:
            return result.to(self._dtype)
        return result


def _is_merging(engine: Any) -> bool:
    """Return whether adapters are merged into the very shards while they are sent."""
    return hasattr(getattr(engine.module, "_fsdp_wrapped_module", engine.module), "peft_config")


def merged_lora_weights(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Weights:
    """`FSDPEngine._merged_lora_per_tensor_param`: send base plus adapter as they are.

    As on verl's plain path, where `per_tensor_param` decides in which dtype each of them is sent.
    """
    if not current_plan().overrides_dtype:
        return wrapped(*args, **kwargs)  # type: ignore[no-any-return]
    return _merged(engine)


def _merged(engine: Any) -> Weights:
    verl = import_module(_FSDP_ENGINE)
    try:
        # The merged weights live only inside the context, so each one is copied before the next is asked for.
        with verl.merged_lora_context(engine.module, backup_adapters=True):
            rounding = _rounding_of(engine)
            weights = verl.normalize_peft_param_name(engine.module.state_dict())
            root = getattr(engine.module, "_fsdp_wrapped_module", engine.module)
            for name, weight in verl.convert_weight_keys(weights, root).items():
                yield name, _copy_to_send(name, weight, rounding, verl.get_device_id())
    finally:
        if engine._is_offload_param:
            verl.offload_fsdp_model_to_cpu(engine.module)


def _copy_to_send(name: str, weight: torch.Tensor, rounding: _Rounding, device: Any) -> torch.Tensor:
    if not isinstance(weight, DTensor):
        return weight.detach().clone()
    shard: Any = rounding.of(name, weight.to(device, non_blocking=True))
    whole: torch.Tensor = shard.full_tensor().detach()
    # On one rank the whole is the shard itself.
    return whole.clone() if _same_storage(whole, weight.to_local()) else whole


def _same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


def new_checkpoint_engine(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`CheckpointEngineRegistry.new`: let engines that cast weights (mooncake, kimi) cast to the plan's dtype.

    Their `rollout_dtype` is bfloat16 by default and cannot be set from YAML: a string is taken for a device.
    """
    plan = current_plan()
    backend = argument(wrapped, args, kwargs, "backend")
    if plan.overrides_dtype and "rollout_dtype" in inspect.signature(_engine_class(backend)).parameters:
        kwargs = {**kwargs, "rollout_dtype": plan.torch_dtype}
    return wrapped(*args, **kwargs)


def _engine_class(backend: Any) -> type:
    registry = import_module("verl.checkpoint_engine.base").CheckpointEngineRegistry
    return registry.get(backend)  # type: ignore[no-any-return]
