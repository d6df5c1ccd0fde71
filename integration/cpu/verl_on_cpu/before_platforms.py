"""verl before 0.9.0, which finds out by itself that it is on a CPU, and has engines and resources for GPUs only."""

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt
from verl_on_cpu import legacy


def install() -> None:
    legacy.install()
    wrapt.register_post_import_hook(register_engines_for_cpu, "verl.workers.engine.base")
    wrapt.register_post_import_hook(name_resources_as_gpus, "verl.utils.device")
    wrapt.register_post_import_hook(unpad_without_flash_attention, "verl.utils.attention_utils")
    wrapt.register_post_import_hook(keep_a_name_for_experts, "vllm.model_executor.layers.fused_moe.layer")
    wrapt.register_post_import_hook(name_the_device, "vllm.platforms.cpu")


def register_engines_for_cpu(base: ModuleType) -> None:
    """An engine that is registered for CUDA is found for a CPU, too."""
    wrapt.wrap_function_wrapper(base, "EngineRegistry.register", for_cpu_too)


def for_cpu_too(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    asked = inspect.signature(wrapped).bind(*args, **kwargs)
    asked.apply_defaults()
    if "device" not in asked.arguments:
        return wrapped(*args, **kwargs)  # verl 0.5.0 does not ask
    devices = asked.arguments["device"]
    listed = [devices] if isinstance(devices, str) else list(devices)
    asked.arguments["device"] = [*listed, "cpu"] if "cuda" in listed else listed
    return wrapped(*asked.args, **asked.kwargs)


def name_resources_as_gpus(device: ModuleType) -> None:
    """Ray schedules by count: GPUs that are only declared (ray_init.num_gpus) place workers as real ones would."""
    device.get_resource_name = lambda: "GPU"


def unpad_without_flash_attention(attention_utils: ModuleType) -> None:
    """flash-attn's functions for padding need CUDA to be installed; verl's own for NPUs are plain torch."""

    def functions() -> tuple[Callable[..., Any], ...]:
        own = import_module("verl.utils.npu_flash_attn_utils")
        return own.index_first_axis, own.pad_input, own.rearrange, own.unpad_input

    attention_utils._get_attention_functions = functions


def keep_a_name_for_experts(layer: ModuleType) -> None:
    """verl asks of each layer whether it is a `FusedMoE`; of that name, the vLLM that runs on a CPU today has none."""
    if not hasattr(layer, "FusedMoE"):
        layer.FusedMoE = type("FusedMoE", (), {})


def name_the_device(cpu: ModuleType) -> None:
    """Both ends of the weights' way to the sampler meet at a socket that is named after the device they share."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # which of the declared GPUs Ray gave this process
    cpu.CpuPlatform.get_device_uuid = classmethod(lambda _cls, _device_id=0: f"cpu-{visible}")
