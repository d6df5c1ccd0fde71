"""The device: ``torch.cuda`` as OpenRLHF calls it, and its meshes and averages on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt


class CpuDevice(str):
    """The current device: OpenRLHF passes it to ``Tensor.to``, and formats it as the index in ``f"cuda:{index}"``."""

    def __new__(cls) -> CpuDevice:
        return super().__new__(cls, "cpu")

    def __format__(self, _spec: str) -> str:
        return "0"


def install() -> None:
    wrapt.register_post_import_hook(answer_for_cuda, "torch.cuda")
    wrapt.register_post_import_hook(compute_on_cpu, "openrlhf.utils.deepspeed.deepspeed")


def answer_for_cuda(cuda: ModuleType) -> None:
    """OpenRLHF calls these unguarded. CUDA stays unavailable to all who ask first."""
    cuda.current_device = CpuDevice
    cuda.current_stream = lambda device=None: None
    cuda.set_device = lambda device: None
    # Work on a CPU is done when the call returns.
    cuda.synchronize = lambda device=None: None


def compute_on_cpu(strategy: ModuleType) -> None:
    wrapt.wrap_function_wrapper(strategy, "init_device_mesh", mesh_of_cpus)
    wrapt.wrap_function_wrapper(strategy, "DeepspeedStrategy.moving_average", average_on_cpu)


def mesh_of_cpus(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """OpenRLHF names the mesh's device type first, and always cuda."""
    return wrapped("cpu", *args[1:], **kwargs)


def average_on_cpu(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """OpenRLHF names the device of the moving average last, and always cuda."""
    *rest, _device = args
    return wrapped(*rest, "cpu", **kwargs)
