"""The way of the weights from learner to sampler: through host memory, where NCCL would broadcast from GPU to GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt


class HostBroadcast:
    """vLLM's group without a device, with the one call that OpenRLHF makes of NCCL's communicator.

    The source does not wait for its receivers. Values and dtype arrive as they were sent.
    """

    def __init__(self, group: Any) -> None:
        self.group = group

    def broadcast(self, tensor: Any, src: int, stream: None = None) -> None:
        if self.group.rank == src:
            # A view would be pickled with all of the storage behind it.
            self.group.broadcast_obj(tensor.detach().clone(), src)
        else:
            tensor.copy_(self.group.broadcast_obj(None, src))


def install() -> None:
    wrapt.register_post_import_hook(connect_through_host, "openrlhf.utils.distributed_util")
    wrapt.register_post_import_hook(receive_in_host_memory, "openrlhf.trainer.ray.vllm_worker_wrap")


def connect_through_host(distributed_util: ModuleType) -> None:
    distributed_util.stateless_init_process_group = stateless_init_process_group


def stateless_init_process_group(
    master_address: str, master_port: int, rank: int, world_size: int, device: object
) -> HostBroadcast:
    from vllm.distributed.utils import StatelessProcessGroup

    return HostBroadcast(StatelessProcessGroup.create(master_address, master_port, rank, world_size))


def receive_in_host_memory(worker: ModuleType) -> None:
    wrapt.wrap_function_wrapper(worker, "WorkerWrap.update_weight", update_weight)


def update_weight(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """OpenRLHF allocates what it receives into on the device it calls "cuda", in the middle of the method.

    It is the only allocation that names this device, so for the length of the call the name means the CPU.
    """
    from openrlhf_on_cpu.host_memory import CudaIsHost

    with CudaIsHost():
        return wrapped(*args, **kwargs)
