"""The FSDP engine as it is built: its gradient scaler, and the dtypes it computes in."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import nn

from fp16_patch.runtime import rope
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.runtime.compute_dtypes import watch_compute
from fp16_patch.scaling.optimizer_step import start_anew
from fp16_patch.scaling.scaler import sharded_scaler
from fp16_patch.verl.fsdp.device import device_type


def role_of(engine: Any) -> str:
    """Return `actor`, `critic` or `ref`: what the engine was built for."""
    if engine.model_config.model_type == "value_model":
        return "critic"
    return "ref" if engine.engine_config.forward_only else "actor"


def build_module(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> nn.Module:
    """`FSDPEngine._build_module`: keep the RoPE frequencies of a model that is stored in half in FP32."""
    module: nn.Module = wrapped(*args, **kwargs)
    if current_plan().overrides_dtype:
        rope.restore(module, f"{role_of(engine)}.fsdp_config.model_dtype", engine.engine_config.model_dtype, "use fp32")
    return module


def build_fsdp_module(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> nn.Module:
    """`FSDPEngine._build_fsdp_module`: give it a scaler for this device with the plan's settings."""
    module: nn.Module = wrapped(*args, **kwargs)
    take_over(engine, module)
    return module


def take_over(engine: Any, module: nn.Module) -> None:
    """Give an engine whose module was just built a scaler if it trains, and note what the module computes in."""
    plan = current_plan()
    start_anew(engine)
    if plan.overrides_dtype:
        trains = plan.scales_loss and not engine.engine_config.forward_only
        engine.scaler = sharded_scaler(plan, device_type()) if trains else None
    ledger().rank = engine.rank
    watch_compute(module, role_of(engine))


def gradient_sync_context(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPEngine._gradient_sync_context`: reduce each micro-batch's gradients, in FP32.

    Under FSDP1's no_sync they would add up in the compute dtype, scaled.
    """
    if current_plan().overrides_dtype and engine.engine_config.strategy == "fsdp":
        return nullcontext()
    return wrapped(*args, **kwargs)
