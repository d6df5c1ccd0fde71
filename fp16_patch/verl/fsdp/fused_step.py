"""The FSDP engine's optimizer step in two passes over the gradients, by `fp16_patch.scaling.fused_step`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling import fused_step
from fp16_patch.verl.fsdp.device import device_type


def build_optimizer(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Optimizer:
    """`FSDPEngine._build_optimizer`: use the kernel that takes a loss scale, unless the configuration names another."""
    optimizer: Optimizer = wrapped(*args, **kwargs)
    plan = current_plan()
    # In every mode that decides a dtype: the arms of a comparison are to differ in nothing else.
    wanted = plan.overrides_dtype and plan.fused_step
    return fused_step.with_fused_kernel(optimizer, device_type()) if wanted else optimizer


def possible(engine: Any) -> bool:
    """Return whether the engine's step can be taken so; otherwise verl takes it."""
    scaler = getattr(engine, "scaler", None)
    if not current_plan().scales_loss or scaler is None or not scaler.is_enabled():
        return False
    if isinstance(engine.module, FullyShardedDataParallel) and not hasattr(engine.module, "_all_handles"):
        return False
    return fused_step.takes_loss_scale(engine.optimizer, device_type())


def take(engine: Any) -> float:
    """Clip, step unless an overflow, adapt the scale, and return the norm, as `FSDPEngine.optimizer_step` does."""
    max_norm = engine.optimizer_config.clip_grad
    norm = fused_step.step(engine.scaler, engine.optimizer, _scaled_norm(engine.module), max_norm)
    return float(norm)


def _scaled_norm(module: nn.Module) -> Tensor:
    """Return the norm that verl takes, of the gradients as they are."""
    if isinstance(module, FullyShardedDataParallel):
        sharded, whole = _by_placement(module)
        if sharded:
            return fused_step.norm_over_ranks(
                _gradients(sharded), _gradients(whole), module.process_group, module.compute_device
            )
    return fused_step.norm_of(_gradients(module.parameters()))


def _by_placement(module: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return parameters of which each rank holds a piece, and those it holds whole, as `clip_grad_norm_` does."""
    sharded: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for handle in module._all_handles:
        flat = handle.flat_param
        (sharded if handle.uses_sharded_strategy else whole).extend(flat._params if handle._use_orig_params else [flat])
    managed = {id(parameter) for parameter in (*sharded, *whole)}
    return sharded, whole + [parameter for parameter in module.parameters() if id(parameter) not in managed]


def _gradients(parameters: Iterable[torch.Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
