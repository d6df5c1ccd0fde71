"""Compute Qwen2's forward step by step, so that each matrix product can be one of a pretended precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu
from transformers import Qwen2ForCausalLM

from integration.bench.rounding import Precision, operand, product


@dataclass
class Cache:
    """The keys and values of the tokens seen, by layer: each (sequences, heads, tokens, head size)."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extended(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            seen_keys, seen_values = self.layers[layer]
            keys, values = torch.cat([seen_keys, keys], 2), torch.cat([seen_values, values], 2)
        self.layers[layer] = (keys, values)
        return keys, values


class RoundedPolicy:
    """A model's function in a precision, with the weights as they are now; gradients go to the FP32 weights.

    Only operands of matrix products are rounded: weights once, here, keys and values when they enter the cache.
    Embedding, norms, RoPE, softmax and residual stream are FP32.
    """

    def __init__(self, model: Qwen2ForCausalLM, precision: Precision | None) -> None:
        self.model = model
        self.precision = precision
        weights = {name.removeprefix("model."): weight for name, weight in model.named_parameters()}
        self._vectors = {name: weight for name, weight in weights.items() if weight.dim() == 1}
        self._matrices = {name: operand(weight, precision) for name, weight in weights.items() if weight.dim() == 2}
        self._epsilon: float = model.config.rms_norm_eps
        self._heads: int = model.config.num_attention_heads
        self._heads_a_key: int = self._heads // model.config.num_key_value_heads

    def logits(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Compute (sequences, tokens, vocabulary) for the (sequences, tokens) that follow those in the cache."""
        cache = Cache() if cache is None else cache
        first, count = cache.tokens, tokens.shape[1]
        stream = embedding(tokens, self.model.model.embed_tokens.weight)
        rotation = self.model.model.rotary_emb(stream, torch.arange(first, first + count)[None])
        hidden = torch.full((count, first + count), -math.inf).triu_(first + 1)
        for layer in range(self.model.config.num_hidden_layers):
            attended = self._attended(layer, stream, rotation, hidden, cache)
            stream = stream + self._linear(f"layers.{layer}.self_attn.o_proj", attended)
            stream = stream + self._mlp(f"layers.{layer}", stream)
        return self._linear("embed_tokens", self._norm("norm", stream))

    def _attended(
        self, layer: int, stream: Tensor, rotation: tuple[Tensor, Tensor], hidden: Tensor, cache: Cache
    ) -> Tensor:
        """Attend, (sequences, tokens, heads · head size); `hidden`, (tokens, tokens seen), is −∞ for later ones."""
        name = f"layers.{layer}"
        inputs = operand(self._norm(f"{name}.input_layernorm", stream), self.precision)
        size = self._matrices[f"{name}.self_attn.q_proj.weight"].shape[0] // self._heads
        queries, keys, values = (
            self._linear(f"{name}.self_attn.{part}_proj", inputs, ready=True).unflatten(-1, (-1, size)).transpose(1, 2)
            for part in "qkv"
        )
        queries, keys, values = (
            operand(part, self.precision) for part in (_rotated(queries, rotation), _rotated(keys, rotation), values)
        )
        keys, values = (part.repeat_interleave(self._heads_a_key, 1) for part in cache.extended(layer, keys, values))
        scores = product(queries, keys.mT, self.precision) / math.sqrt(size)
        shares = operand((scores + hidden).softmax(-1), self.precision)
        return product(shares, values, self.precision).transpose(1, 2).flatten(2)

    def _mlp(self, name: str, stream: Tensor) -> Tensor:
        inputs = operand(self._norm(f"{name}.post_attention_layernorm", stream), self.precision)
        gate, up = (self._linear(f"{name}.mlp.{part}_proj", inputs, ready=True) for part in ("gate", "up"))
        return self._linear(f"{name}.mlp.down_proj", silu(gate) * up)

    def _linear(self, name: str, inputs: Tensor, *, ready: bool = False) -> Tensor:
        """Multiply by a layer's weights; `ready` inputs are operands already."""
        inputs = inputs if ready else operand(inputs, self.precision)
        output = product(inputs.flatten(0, 1), self._matrices[f"{name}.weight"].mT, self.precision)
        output = output.unflatten(0, inputs.shape[:2])
        bias = self._vectors.get(f"{name}.bias")
        return output if bias is None else output + bias

    def _norm(self, name: str, inputs: Tensor) -> Tensor:
        return rms_norm(inputs, inputs.shape[-1:], self._vectors[f"{name}.weight"], self._epsilon)


def _rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to (sequences, heads, tokens, head size), by cosines and sines (1, tokens, head size)."""
    cosine, sine = rotation
    first, second = heads.chunk(2, -1)
    return heads * cosine[:, None] + torch.cat([-second, first], -1) * sine[:, None]
