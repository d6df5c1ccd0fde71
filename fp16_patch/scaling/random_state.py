"""The random number generators of a process, to compute an update again with the same dropout."""

from __future__ import annotations

import torch


class RandomState:
    """Saves the generators of this process, of the host and of the device in use, as they are now.

    Args:
        device: type of the device, as `cuda` or `npu`; for `cpu` there is only the host's.
    """

    def __init__(self, device: str) -> None:
        self._device = None if device == "cpu" else getattr(torch, device)
        self._host_state = torch.get_rng_state()
        self._device_state = None if self._device is None else self._device.get_rng_state()

    def restore(self) -> None:
        torch.set_rng_state(self._host_state)
        if self._device is not None:
            self._device.set_rng_state(self._device_state)
