"""The accelerator: ``torch.cpu`` as verl calls it, gloo in place of NCCL, and where verl learns that this is all."""

import os
from importlib.util import find_spec
from types import ModuleType

import torch
import wrapt

RELEASES = ("empty_cache", "ipc_collect", "reset_peak_memory_stats")
GAUGES = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")


class CpuDevice(str):
    """The current device: verl passes it to ``Tensor.to``, and formats it as the index in ``f"cpu:{index}"``."""

    def __new__(cls) -> "CpuDevice":
        return super().__new__(cls, "cpu")

    def __format__(self, _spec: str) -> str:
        return "0"


def install() -> None:
    if find_spec("verl.plugin") is not None:
        from verl_on_cpu import platform

        platform.install()
    else:
        from verl_on_cpu import before_platforms

        before_platforms.install()
    complete_torch_cpu()
    wrapt.register_post_import_hook(use_gloo, "verl.utils.distributed")


def complete_torch_cpu() -> None:
    """verl calls these on ``torch.<device>`` unguarded, and ``torch.cpu`` lacks them."""
    for name in RELEASES:
        setattr(torch.cpu, name, lambda *_args, **_kwargs: None)
    for name in GAUGES:
        setattr(torch.cpu, name, lambda *_args, **_kwargs: 0)
    torch.cpu.get_rng_state = torch.get_rng_state
    torch.cpu.set_rng_state = torch.set_rng_state
    torch.cpu.current_device = CpuDevice


def use_gloo(distributed: ModuleType) -> None:
    """verl asks for ``cpu:gloo,<device>:<backend>``; when the device is the CPU, torch refuses the name given twice."""

    def initialize(wrapped, _instance, args, kwargs):
        return wrapped(*args, **{"backend": "gloo", **kwargs})

    def initialize_here(_wrapped, _instance, _args, _kwargs):
        torch.distributed.init_process_group("gloo")
        return tuple(int(os.environ[name]) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))

    wrapt.wrap_function_wrapper(distributed, "initialize_global_process_group_ray", initialize)
    # The one of trainers under torchrun takes no other backend.
    wrapt.wrap_function_wrapper(distributed, "initialize_global_process_group", initialize_here)
