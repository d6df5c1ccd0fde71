"""DeepSpeed's accelerator: one that takes float16 and ends its collectives in order, as every GPU does."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt


def install() -> None:
    wrapt.register_post_import_hook(support_float16, "deepspeed.accelerator.cpu_accelerator")
    wrapt.register_post_import_hook(gather_in_order, "deepspeed.comm.torch")


def support_float16(accelerator: ModuleType) -> None:
    """DeepSpeed takes float16 only from a CPU with instructions for it; torch computes in it on any."""
    accelerator.CPU_Accelerator.is_fp16_supported = lambda _self: True


def gather_in_order(comm: ModuleType) -> None:
    wrapt.wrap_function_wrapper(comm, "TorchBackend.all_gather_into_tensor", gathered)


def gathered(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """ZeRO-3 gathers the small parameters one by one and waits for the last: on a GPU's stream, then all are there.

    gloo works on several at once. The last may be done before the first, whose memory then still holds anything.
    And what it copies is seen by autograd, which forbids it on the views of weights that DeepSpeed 0.18 gathers into.
    """
    import torch

    with torch.no_grad():
        handle = wrapped(*args, **kwargs)
        if handle is not None:
            handle.wait()
    return handle
