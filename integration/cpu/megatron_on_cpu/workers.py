"""verl's Megatron workers, which it had before 0.8.0: built and called where CUDA is the CPU."""

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import wrapt
from megatron_on_cpu import cuda
from megatron_on_cpu.engine import in_the_mode

CALLS = {
    "ActorRolloutRefWorker": ("update_actor", "compute_log_prob", "compute_ref_log_prob"),
    "CriticWorker": ("update_critic", "compute_values"),
}
CALLS_OF_BOTH = ("init_model", "save_checkpoint", "load_checkpoint")


def install() -> None:
    wrapt.register_post_import_hook(run_on_the_cpu, "verl.workers.megatron_workers")


def leave_out_kernels() -> None:
    """verl 0.5.0 imports fused kernels, which need Triton, with its models, whether they are used or not."""
    if find_spec("triton") is None:
        name = "verl.utils.kernel.kernels"
        sys.modules.setdefault(name, ModuleType(name))


def run_on_the_cpu(megatron_workers: ModuleType) -> None:
    leave_out_kernels()
    for worker, calls in CALLS.items():
        wrapt.wrap_function_wrapper(megatron_workers, f"{worker}.__init__", prepared)
        for name in (*CALLS_OF_BOTH, *calls):
            wrapt.wrap_function_wrapper(megatron_workers, f"{worker}.{name}", in_the_mode)
    if hasattr(megatron_workers.ActorRolloutRefWorker, "rollout_mode"):
        wrapt.wrap_function_wrapper(megatron_workers, "ActorRolloutRefWorker.rollout_mode", awaited_in_the_mode)


@functools.cache
def install_cuda_once() -> None:
    cuda.install()


def prepared(wrapped: Callable[..., Any], _instance: Any, args: Any, kwargs: Any) -> Any:
    install_cuda_once()
    return in_the_mode(wrapped, _instance, args, kwargs)


async def awaited_in_the_mode(wrapped: Callable[..., Any], _instance: Any, args: Any, kwargs: Any) -> Any:
    """The weights are exported while they are sent."""
    with cuda.CudaIsCpu():
        return await wrapped(*args, **kwargs)
