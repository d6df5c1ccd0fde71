"""The device that verl computes on."""

from __future__ import annotations


def device_type() -> str:
    """Return torch's name of its type: `cuda`, `npu`, `cpu`."""
    from verl.utils.device import get_device_name

    return str(get_device_name())
