"""Attention on packed sequences, which only TransformerEngine's kernels know, by torch's own."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class TEDotProductAttention(DotProductAttention):
    """Megatron's own attention; where sequences are packed (thd), each by itself."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        heads = [each.transpose(0, 1) for each in (query, key, value)]  # [heads, tokens, size of a head]
        return torch.cat(
            [self._attended(*(each[:, start:end] for each in heads)) for start, end in pairwise(bounds) if end > start]
        )

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [tokens, heads · size of a head] of one sequence."""
        grouped = query.shape[0] != key.shape[0]
        attended = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )
        return attended[0].transpose(0, 1).flatten(1)
