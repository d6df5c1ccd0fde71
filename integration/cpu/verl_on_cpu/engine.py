"""The learner: FSDP without an accelerator, and log-probs as precise as CUDA autocast makes them."""

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed.fsdp
import wrapt
from torch.distributed.fsdp import _init_utils

LOGITS_TO_FP32 = (
    "logprobs_from_logits_v2",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "calculate_sum_pi_squared_from_logits",
)


def install() -> None:
    allow_cpu_broadcast()
    leave_reference_unpinned()
    wrapt.register_post_import_hook(leave_sharded_reference_unpinned, "verl.workers.engine.fsdp.transformer_impl")
    wrapt.register_post_import_hook(reduce_logits_in_fp32, "verl.utils.torch_functional")
    wrapt.register_post_import_hook(unpad_without_flash_attention, "verl.utils.attention_utils")


def allow_cpu_broadcast() -> None:
    """FSDP1 refuses to sync CPU tensors because NCCL could not; gloo can."""
    _init_utils._check_module_states_for_sync_module_states = lambda _states: None


def leave_reference_unpinned() -> None:
    """verl offloads an FSDP1 reference to pinned host memory: here that is the device itself, and pinning fails."""
    torch.distributed.fsdp.CPUOffload = lambda **_kwargs: None


def leave_sharded_reference_unpinned(transformer_impl: ModuleType) -> None:
    """The same for FSDP2, whose offload works on a CPU once it is not asked to pin."""
    policy = torch.distributed.fsdp.CPUOffloadPolicy
    transformer_impl.CPUOffloadPolicy = lambda pin_memory=True: policy(pin_memory=False)


def reduce_logits_in_fp32(torch_functional: ModuleType) -> None:
    """CUDA autocast runs log_softmax, softmax and logsumexp in fp32; CPU autocast does not, and rounds every log-prob.

    That rounding would hide the effect of the compute dtype, so every run is spared it, patched or stock.
    """
    for name in (each for each in LOGITS_TO_FP32 if hasattr(torch_functional, each)):
        wrapt.wrap_function_wrapper(torch_functional, name, with_fp32_logits)


def with_fp32_logits(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "logits" in kwargs:
        return wrapped(*args, **{**kwargs, "logits": kwargs["logits"].float()})
    logits, *rest = args
    return wrapped(logits.float(), *rest, **kwargs)


def unpad_without_flash_attention(attention_utils: ModuleType) -> None:
    """Before 0.9.1 verl unpads by flash-attn, which is CUDA only, even where attention does without."""
    if find_spec("flash_attn") is None:
        attention_utils._get_attention_functions = transformers_padding


def transformers_padding() -> tuple[Callable[..., Any], ...]:
    """The same in torch, which transformers has for kernels that lack it; in the order that verl wants."""
    from einops import rearrange
    from transformers import modeling_flash_attention_utils as padding

    def index_first_axis(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return tensor[indices]

    return index_first_axis, padding._pad_input, rearrange, padding._unpad_input
