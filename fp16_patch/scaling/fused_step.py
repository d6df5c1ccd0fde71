"""An optimizer step that reads the gradients twice: once for their norm, once in the optimizer's own kernel.

Torch unscales the gradients, takes their norm, multiplies them by the clipping coefficient and steps, which reads them
twice unless its kernel is fused: five passes. Here the norm is taken of the scaled gradients, which also says whether
they are finite, and the fused kernels of torch's Adam and AdamW divide by loss scale ÷ clipping coefficient as they
read.

With a power of two as scale the norm is the same to the last bit, and so is the step where nothing is clipped. Where it
is, a gradient differs by one unit in the last place at most: the divisor and the quotient are rounded, elsewhere the
product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Adam, AdamW, Optimizer

from fp16_patch.runtime import torch_private
from fp16_patch.scaling.ranks import max_over_ranks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.amp import GradScaler

_FUSED_ON = ("cuda", "cpu")
# As torch.nn.utils.clip_grad_norm_ and FSDP's: keeps the quotient finite.
_EPSILON = 1e-6


def with_fused_kernel(optimizer: Optimizer, device: str) -> Optimizer:
    """Return the same optimizer on torch's fused kernel; itself if a kernel was chosen, or if it has no fused one.

    Args:
        optimizer: before its first step.
        device: type of the one that computes. Parameters that are offloaded from it keep their kernel.
    """
    if type(optimizer) not in (Adam, AdamW):
        return optimizer
    if takes_loss_scale(optimizer, device):
        optimizer.register_load_state_dict_pre_hook(_stay_fused)
        return optimizer
    if _kernel_is_chosen(optimizer) or not _kernel_fits(optimizer, device):
        return optimizer
    groups = [{**group, "foreach": False, "fused": True} for group in optimizer.param_groups]
    fused = type(optimizer)(groups, fused=True)
    fused.register_load_state_dict_pre_hook(_stay_fused)
    return fused


def _kernel_is_chosen(optimizer: Optimizer) -> bool:
    groups = optimizer.param_groups
    named = any(group.get(kernel) is not None for group in groups for kernel in ("fused", "foreach"))
    return named or any(group.get(need) for group in groups for need in ("capturable", "differentiable"))


def _kernel_fits(optimizer: Optimizer, device: str) -> bool:
    return device in _FUSED_ON and all(
        parameter.device.type == device and parameter.dtype is torch.float32
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def _stay_fused(_optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    # A checkpoint names the kernel that wrote it, and torch goes on with that one, whose step takes no loss scale.
    return {**state, "param_groups": [{**group, "foreach": False, "fused": True} for group in state["param_groups"]]}


def takes_loss_scale(optimizer: Optimizer, device: str) -> bool:
    """Return whether the optimizer's kernel divides gradients by a loss scale that is on the device that computes.

    torch copies a scale from a GPU to the kernel of offloaded parameters without waiting until it has arrived.
    """
    return torch_private.takes_grad_scale(optimizer) and all(
        group.get("fused") and all(parameter.device.type == device for parameter in group["params"])
        for group in optimizer.param_groups
    )


def step(scaler: GradScaler, optimizer: Optimizer, scaled_norm: Tensor, max_norm: float) -> Tensor:
    """Unscale, clip and step in one pass, unless the norm is not finite; then tell the scaler.

    Args:
        scaler: torch's; not yet asked to unscale.
        scaled_norm: 0-dim, the norm of all ranks' scaled gradients together.
        max_norm: the unscaled gradients are scaled down to it where they are larger, as by
            `torch.nn.utils.clip_grad_norm_`.

    Returns:
        The norm of the unscaled gradients before clipping, 0-dim; not finite if the step was skipped.
    """
    scale = torch_private.scale_on_device(scaler)
    norm = scaled_norm.to(scale) / scale
    clip = (max_norm / (norm + _EPSILON)).clamp(max=1.0)
    # A negative one comes of a negative scale. 0-dim, as GradScaler's: ShardedGradScaler's own (1,) does not go with
    # the fused kernels' 0-dim step counters.
    unusable = norm.isfinite().logical_and(norm >= 0).logical_not().to(scale)
    # As torch's ShardedGradScaler: ranks whose groups share no gradient share the scale all the same.
    torch_private.mark_unscaled(scaler, optimizer, found_inf=max_over_ranks(unusable))
    optimizer.grad_scale = scale / clip
    scaler.step(optimizer)
    scaler.update()
    return norm


def norm_of(gradients: Iterable[Tensor]) -> Tensor:
    """Return their norm as one vector, FP32, 0-dim; of DTensors, all ranks' together. Reads each gradient once."""
    total = torch.nn.utils.get_total_norm(list(gradients), 2.0)
    whole: Tensor = total.full_tensor() if hasattr(total, "full_tensor") else total
    return whole


def norm_over_ranks(sharded: Iterable[Tensor], whole: Iterable[Tensor], group: Any, device: torch.device) -> Tensor:
    """Return the norm of all gradients as one vector, FP32, 0-dim.

    Args:
        sharded: gradients of which each rank has a piece.
        whole: gradients that each rank has whole.
        group: the ranks whose pieces make up the gradients.
        device: the one they communicate from.
    """
    squared = _local_norm(sharded, device) ** 2
    torch.distributed.all_reduce(squared, group=group)
    return (squared + _local_norm(whole, device) ** 2) ** 0.5


def _local_norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    norms = [torch.linalg.vector_norm(gradient.detach(), 2.0, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms), 2.0).to(device) if norms else torch.zeros((), device=device)
