"""torch's scaler for sharded gradients, where these lie on the host, as FSDP2's `CPUOffloadPolicy` leaves them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import Optimizer


class HostReadingScaler(ShardedGradScaler):  # type: ignore[misc]  # torch has no types for it
    """Unscales gradients on the host by a scale that has arrived there.

    torch copies the scale and the overflow flag from the accelerator without waiting, and its kernel for the host reads
    and writes them at once: it may divide by another number, and the copy may land on a flag that is set already.
    """

    def _unscale_grads_(self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        if gradients_on_host(optimizer):
            inv_scale, found_inf = inv_scale.cpu(), found_inf.cpu()
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)


def gradients_on_host(optimizer: Optimizer) -> bool:
    """Return whether one of the optimizer's gradients is in the host's memory."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return any(parameter.grad is not None and parameter.grad.device.type == "cpu" for parameter in parameters)
