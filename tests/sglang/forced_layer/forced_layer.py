"""A plugin of SGLang's that has activations computed in bfloat16, where weights, cache and head look right."""

from __future__ import annotations

from typing import Any

LAYERS = "sglang.srt.layers"


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{LAYERS}.activation.SiluAndMul.forward_native", in_bfloat16, HookType.AROUND)
    HookRegistry.register(f"{LAYERS}.linear.RowParallelLinear.forward", in_its_weights_dtype, HookType.AROUND)


def in_bfloat16(original: Any, *args: Any) -> Any:
    """As SGLang does itself where it is told `rl_on_policy_target`."""
    return original(*args).bfloat16()


def in_its_weights_dtype(original: Any, module: Any, states: Any, *args: Any, **kwargs: Any) -> Any:
    return original(module, states.to(module.weight.dtype), *args, **kwargs)
