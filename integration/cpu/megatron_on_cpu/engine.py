"""verl's Megatron engine: built and called where CUDA is the CPU."""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import wrapt
from megatron_on_cpu import bridge, cuda

CALLS = (
    "initialize",
    "forward_backward_batch",
    "optimizer_zero_grad",
    "optimizer_step",
    "save_checkpoint",
    "load_checkpoint",
    "to",
)


def install() -> None:
    wrapt.register_post_import_hook(run_on_the_cpu, "verl.workers.engine.megatron.transformer_impl")


def run_on_the_cpu(transformer_impl: ModuleType) -> None:
    """Each call enters the mode by itself: Ray's threads do not inherit it."""
    for name in CALLS:
        wrapt.wrap_function_wrapper(transformer_impl, f"MegatronEngine.{name}", in_the_mode)
    wrapt.wrap_function_wrapper(transformer_impl, "MegatronEngine.__init__", prepared)
    wrapt.wrap_function_wrapper(transformer_impl, "MegatronEngine.get_per_tensor_param", yielding_in_the_mode)


@functools.cache
def _install_once() -> None:
    cuda.install()
    bridge.import_once()
    _tell_the_device_from_the_host()


def _tell_the_device_from_the_host() -> None:
    """An engine goes to the host between calls if it is told so: not where its device has the host's name."""
    from verl.workers.engine import base
    from verl.workers.engine.megatron import transformer_impl

    base.get_device_name = transformer_impl.get_device_name = lambda: "cuda"


def prepared(wrapped: Callable[..., Any], _instance: Any, args: Any, kwargs: Any) -> Any:
    _install_once()
    return in_the_mode(wrapped, _instance, args, kwargs)


def in_the_mode(wrapped: Callable[..., Any], _instance: Any, args: Any, kwargs: Any) -> Any:
    with cuda.CudaIsCpu():
        return wrapped(*args, **kwargs)


def yielding_in_the_mode(wrapped: Callable[..., Any], _instance: Any, args: Any, kwargs: Any) -> Any:
    """The weights come from a generator, which runs when they are asked for."""
    with cuda.CudaIsCpu():
        weights, adapter = wrapped(*args, **kwargs)
    return _each_in_the_mode(iter(weights)), adapter


def _each_in_the_mode(weights: Iterator[Any]) -> Iterator[Any]:
    end = object()
    while True:
        with cuda.CudaIsCpu():
            named = next(weights, end)
        if named is end:
            return
        yield named
