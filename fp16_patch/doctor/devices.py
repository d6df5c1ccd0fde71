"""Lists this machine's accelerators, without importing torch where NVIDIA's own tool can answer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One of these is there if an accelerator is: NVIDIA's, AMD's, NVIDIA's under WSL, a Jetson's.
_DEVICE_FILES = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu")
_QUERY = ("--query-gpu=name,compute_cap", "--format=csv,noheader")
_ANSWER_TIMEOUT_S = 20
# FP16 matrix units came with compute capability 7.0; bfloat16 with 8.0.
_FIRST_WITH_FP16 = 7


def devices() -> list[dict[str, Any]]:
    """Return name, whether it computes FP16 natively, and what is known, of each device; of the CPU if it is alone."""
    asked = None if "CUDA_VISIBLE_DEVICES" in os.environ else _by_nvidia_smi()
    found = asked if asked is not None else list(_by_torch())
    return found or [{"name": "CPU", "fp16": True, "facts": "no accelerator: FP16 is correct here, and slow"}]


def _by_nvidia_smi() -> list[dict[str, Any]] | None:
    """Ask NVIDIA's tool; None if it is not there, or too old to know."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        asked = subprocess.run(
            [program, *_QUERY], capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=True
        )
        rows = [line.rsplit(",", 1) for line in asked.stdout.splitlines()]
        return [_device(name.strip(), *map(int, capability.strip().split("."))) for name, capability in rows]
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def _by_torch() -> Iterator[dict[str, Any]]:
    if not any(Path(file).exists() for file in _DEVICE_FILES):
        return
    try:
        import torch
    except ImportError:
        return
    for index in range(torch.cuda.device_count()):
        yield _device(torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index))


def _device(name: str, major: int, minor: int) -> dict[str, Any]:
    facts = f"compute capability {major}.{minor}"
    return {"name": name, "fp16": major >= _FIRST_WITH_FP16, "facts": facts}
