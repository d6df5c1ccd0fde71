"""A scheduler on a CPU that rounds where it does on CUDA: a plugin of SGLang's, and no part of `fp16_patch`."""

from typing import Any

import torch

ROPE = "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.__init__"


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(ROPE, keep_rope_in_float32, HookType.AFTER)


def keep_rope_in_float32(_result: None, rope: Any, *_args: Any, **_kwargs: Any) -> None:
    """On CUDA cosines and sines are FP32, and queries and keys are rounded once, after they were rotated."""
    rope.register_buffer("cos_sin_cache", rope._compute_cos_sin_cache(), persistent=False)
    rotate = rope._apply_rotary_emb_wrapped

    def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any) -> torch.Tensor:
        return rotate(states.float(), cos.float(), sin.float(), *args).to(states.dtype)

    rope._apply_rotary_emb_wrapped = rotated
