"""The workers of before 0.8.0: loaded with an attention that runs on a CPU, and nothing pinned."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed
import torch.distributed.fsdp
import wrapt

DEVICE_NAME = "CPU"


def install() -> None:
    # verl 0.5.0 asks for these: the name is looked up in a table of promised flops.
    torch.cpu.get_device_name = lambda *_args: DEVICE_NAME
    torch.cpu.mem_get_info = lambda *_args: (0, 0)
    wrapt.wrap_function_wrapper(torch.distributed, "init_process_group", join_by_gloo)
    wrapt.register_post_import_hook(leave_sharded_models_unpinned, "verl.utils.fsdp_utils")
    wrapt.register_post_import_hook(load_with_sdpa, "transformers.modeling_utils")


def join_by_gloo(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The workers ask for NCCL by name, on any device but an NPU."""
    asked = inspect.signature(wrapped).bind(*args, **kwargs)
    if "nccl" in str(asked.arguments.get("backend")):
        asked.arguments["backend"] = "gloo"
    return wrapped(*asked.args, **asked.kwargs)


def leave_sharded_models_unpinned(fsdp_utils: ModuleType) -> None:
    """FSDP2's offload works on a CPU once it is not asked to pin."""
    policy = torch.distributed.fsdp.CPUOffloadPolicy
    fsdp_utils.CPUOffloadPolicy = lambda pin_memory=True: policy(pin_memory=False)


def load_with_sdpa(modeling_utils: ModuleType) -> None:
    """verl 0.5.0 and 0.6.0 hard-code flash_attention_2, and flash-attn is CUDA only."""
    wrapt.wrap_function_wrapper(modeling_utils, "PreTrainedModel.from_pretrained", from_pretrained_with_sdpa)


def from_pretrained_with_sdpa(
    wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return wrapped(*args, **{**kwargs, "attn_implementation": "sdpa"})
