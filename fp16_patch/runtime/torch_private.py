"""Holds torch's private names that we depend on, each behind a function that says why; a contract test covers them.

No public name gives what is taken here. Where torch gains one, or changes a private one, this is the module to mend.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def scale_on_device(scaler: Any) -> Tensor:
    """Return a `GradScaler`'s loss scale, float32, 0-dim, on its device.

    `get_scale` returns a number, for which the host waits for the accelerator.

    Raises:
        RuntimeError: no loss was scaled yet, so there is no scale on a device.
    """
    scale: Tensor | None = scaler._get_scale_async()
    if scale is None:
        raise RuntimeError("no loss was scaled before this step")
    return scale


def steps_since_growth(scaler: Any) -> int:
    """Return how many steps a `GradScaler` has counted since its scale last changed.

    Its `state_dict` has the count too, but is empty while the scaler is disabled.
    """
    return int(scaler._get_growth_tracker())


def takes_grad_scale(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's kernel divides by its attribute `grad_scale`, as torch's fused ones do.

    `GradScaler.step` asks for the same attribute.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def mark_unscaled(scaler: Any, optimizer: Optimizer, found_inf: Tensor) -> None:
    """Leave in a `GradScaler` what `unscale_` leaves, without its pass over the gradients.

    torch documents that a scaler takes the `grad_scale` it finds on an optimizer whose gradients are unscaled already,
    but only `unscale_` itself can say that they are.

    Args:
        found_inf: float32, 0-dim, 1 if a gradient is not finite; the scaler skips the step then.
    """
    from torch.amp.grad_scaler import OptState

    state = scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {found_inf.device: found_inf}
    state["stage"] = OptState.UNSCALED


def job_store() -> Any:
    """Return the key-value store that all ranks of a process group have met by.

    With a collective a rank cannot find out whether another one takes part in it, without waiting for ever.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
