"""Attention on packed sequences, which only TransformerEngine's kernels know, by torch's own."""

import copy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class TEDotProductAttention(DotProductAttention):
    """Megatron's own attention; where sequences are packed (thd), each by itself.

    Under context parallelism a rank has two parts of every sequence, one from each end. It attends from them to the
    keys and values of all ranks.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # Megatron's own has no context parallelism, and refuses it here.
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        self.config = config

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
        ranks = self.config.context_parallel_size
        bounds = [bound // ranks for bound in packed_seq_params.cu_seqlens_q.tolist()]
        sequences = [slice(start, end) for start, end in pairwise(bounds) if end > start]
        if ranks > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = (_of_all_ranks(each, group) for each in (key, value))
        else:
            key, value = key[None], value[None]
        return torch.cat([self._attended(query[each], key[:, each], value[:, each]) for each in sequences])

    def _attended(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return [tokens, heads · size of a head] of one sequence; `keys` and `values` have each rank's part."""
        ranks, tokens = keys.shape[:2]
        places = [_places(rank, ranks, tokens) for rank in range(ranks)]
        own = places[parallel_state.get_context_parallel_rank()] if ranks > 1 else places[0]
        query, key, value = (each.transpose(0, 1) for each in (query, keys.flatten(0, 1), values.flatten(0, 1)))
        attended = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=None if ranks == 1 else own[:, None] >= torch.cat(places),
            is_causal=ranks == 1,
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.shape[0] != key.shape[0],
        )
        return attended[0].transpose(0, 1).flatten(1)


def _of_all_ranks(own: Tensor, group: Any) -> Tensor:
    """Return [ranks, tokens, heads, size of a head]; backward adds up what each rank's queries give."""
    return gather_from_sequence_parallel_region(own, group=group).unflatten(0, (-1, len(own)))


def _places(rank: int, ranks: int, tokens: int) -> Tensor:
    """Where a rank's tokens lie in their sequence: a part from the front, the one as far from the end."""
    if ranks == 1:
        return torch.arange(tokens)
    front = torch.arange(tokens // 2)
    return torch.cat([front + len(front) * number for number in (rank, 2 * ranks - 1 - rank)])
