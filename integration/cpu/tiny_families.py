"""Small random models of the families people train, and models made to leave FP16's range in one known place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from integration.cpu.tiny_model import character_tokenizer

# 32 dimensions a head: vLLM's CPU build has no attention for fewer.
HIDDEN, INNER, LAYERS, HEADS = 64, 128, 3, 2
STD = 0.05

_COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": INNER}
# model_type → what its configuration has besides the common sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "llama": {},
    "mistral": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "qwen3_moe": {"head_dim": 32, "decoder_sparse_step": 1, **_EXPERTS},
    "mixtral": _EXPERTS,
    "gpt_neox": {},
    "phi": {},
}
# vLLM keeps the router of this one in FP32, whatever the dtype of the rest.
ROUTED_IN_FP32: dict[str, dict[str, Any]] = {
    "glm4_moe": {"head_dim": 32, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1, **_EXPERTS},
}


def tiny_family(model_type: str, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """An untrained FP32 model of a family, of 64 dimensions and three layers, the same for the same seed.

    ``sizes`` are of its configuration, and win.
    """
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    config = AutoConfig.for_model(
        model_type,
        **{**_COMMON, **{**FAMILIES, **ROUTED_IN_FP32}[model_type], **sizes},
        vocab_size=len(tokenizer),
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=STD)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=STD)
    return model


@dataclass(frozen=True)
class Unsafe:
    """A model that FP16 cannot hold.

    Attributes:
        model_type: the family it is made of.
        spoil: changes its weights; what it computes stays finite in FP32.
        phase: `forward` or `backward`, where the first number too large comes up.
        module: the module it comes up in, as the model calls it.
    """

    model_type: str
    spoil: Callable[[PreTrainedModel], None]
    phase: str
    module: str


def _embedding(model: PreTrainedModel) -> None:
    _scale(model, {"model.embed_tokens": 1e6})


def _residual(model: PreTrainedModel) -> None:
    _scale(model, {"model.layers.1.mlp.down_proj": 1e6})


def _mlp(model: PreTrainedModel) -> None:
    """The product of gate and up is too large, what leaves the MLP is not."""
    _scale(model, {f"model.layers.1.mlp.{name}": factor for name, factor in _MLP_FACTORS.items()})


_MLP_FACTORS = {"gate_proj": 1e3, "up_proj": 1e3, "down_proj": 1e-6}


def _attention_scores(model: PreTrainedModel) -> None:
    _scale(model, {"model.layers.2.self_attn.q_proj": 1e3, "model.layers.2.self_attn.k_proj": 1e3})


def _router(model: PreTrainedModel) -> None:
    _scale(model, {"model.layers.1.mlp.gate": 1e6})


def _gradients(model: PreTrainedModel) -> None:
    """Small forward: the head undoes what the last norm takes away. Backward, there is only the head."""
    _scale(model, {"model.norm": 1e-9, "lm_head": 1e9})


def _one_gradient(model: PreTrainedModel) -> None:
    """One hidden unit of one layer, next to nothing forward, on which the loss depends a great deal."""
    mlp = model.get_submodule("model.layers.1.mlp")
    with torch.no_grad():
        mlp.gate_proj.weight[3] *= 1e-11
        mlp.down_proj.weight[:, 3] *= 1e11


def _scale(model: PreTrainedModel, factors: dict[str, float]) -> None:
    with torch.no_grad():
        for name, factor in factors.items():
            model.get_submodule(name).weight.mul_(factor)


UNSAFE = {
    "embedding": Unsafe("qwen2", _embedding, "forward", "model.embed_tokens"),
    "residual": Unsafe("llama", _residual, "forward", "model.layers.1.mlp.down_proj"),
    "mlp": Unsafe("mistral", _mlp, "forward", "model.layers.1.mlp.down_proj"),
    "attention_scores": Unsafe("qwen2", _attention_scores, "forward", "model.layers.2.self_attn"),
    "router": Unsafe("qwen3_moe", _router, "forward", "model.layers.1.mlp.gate"),
    "gradients": Unsafe("qwen2", _gradients, "backward", "lm_head"),
    "one_gradient": Unsafe("llama", _one_gradient, "backward", "model.layers.1.mlp.down_proj"),
}


def write_family(model_type: str, out: Path, **sizes: int) -> Path:
    return _write(tiny_family(model_type, **sizes), out)


def write_unsafe(name: str, out: Path) -> Path:
    unsafe = UNSAFE[name]
    model = tiny_family(unsafe.model_type)
    unsafe.spoil(model)
    return _write(model, out)


def _write(model: PreTrainedModel, out: Path) -> Path:
    model.save_pretrained(out)
    character_tokenizer().save_pretrained(out)
    return out
