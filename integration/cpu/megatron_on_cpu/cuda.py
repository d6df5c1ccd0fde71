"""``torch.cuda`` as Megatron calls it: one device, which is the CPU, and streams that do at once what is queued."""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from verl_on_cpu.device import CpuDevice

NOTHING = ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "ipc_collect")


class Stream:
    """A stream or an event: all that was queued is done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> "Stream":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None


class CudaIsCpu(TorchFunctionMode):
    """Within it, tensors that are asked for on CUDA are made on the CPU. A mode holds for the thread that enters it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        # No host memory is pinned without a device that would read it.
        kwargs.pop("pin_memory", None)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers tell FP16 from FP32 parameters by the names of CUDA's types.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def install() -> None:
    cuda = torch.cuda
    cuda.current_device = CpuDevice
    cuda.current_stream = cuda.default_stream = lambda *_args, **_kwargs: Stream()
    cuda.Event = cuda.Stream = Stream
    cuda.stream = lambda *_args: contextlib.nullcontext()
    for name in NOTHING:
        setattr(cuda, name, lambda *_args, **_kwargs: None)
    torch.nn.Module.cuda = lambda self, *_: self
    _keep_random_state_on_the_host()


def _keep_random_state_on_the_host() -> None:
    """The generator of the device is the host's. Megatron keeps one state a purpose, and puts it there for a while."""
    from megatron.core.tensor_parallel import random

    cuda = torch.cuda
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
