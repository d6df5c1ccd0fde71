"""The sampler: vLLM's CPU build, ready to take new weights while it serves."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt


def install() -> None:
    wrapt.register_post_import_hook(compute_with_plain_weights, "vllm.model_executor.layers.utils")


def compute_with_plain_weights(layer_utils: ModuleType) -> None:
    wrapt.wrap_function_wrapper(layer_utils, "dispatch_cpu_unquantized_gemm", plain_linear)


def plain_linear(_wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """vLLM on a CPU computes with a packed copy of a linear layer's weight, and drops the weight itself.

    OpenRLHF loads new weights into the live engine and has nothing packed anew: the copy would stay as it was.
    """
    import torch

    layer = args[0] if args else kwargs["layer"]
    layer.cpu_linear = torch.nn.functional.linear
