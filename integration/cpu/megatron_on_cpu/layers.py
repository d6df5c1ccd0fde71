"""TransformerEngine's layers in plain torch, by its class names: both bridges tell by these which weight is which."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from torch import Tensor, nn


class TENorm(nn.RMSNorm):
    """An RMS norm. Where each rank has a part of the sequence, Megatron adds up the gradients of its weight."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class TELayerNormColumnParallelLinear(ColumnParallelLinear):
    """An RMS norm, and a linear layer behind it."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.epsilon = config.layernorm_epsilon
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.layer_norm_weight, self.epsilon)
        return super().forward(normed, *args, **kwargs)


class TEGroupedLinear(nn.Module):
    """A linear layer an expert, on tokens that are sorted by expert.

    Attributes:
        split: the dimension of the weight of which each rank of expert-tensor parallelism has a part. What is sent
            between these ranks is the dispatcher's.
    """

    split: int

    def __init__(self, num_gemms: int, input_size: int, output_size: int, *, config: Any, **_: Any) -> None:
        super().__init__()
        self.experts = num_gemms
        ranks = config.expert_tensor_parallel_size
        sizes = [output_size, input_size]
        sizes[self.split] //= ranks
        for expert in range(num_gemms):
            weight = nn.Parameter(torch.empty(sizes, dtype=config.params_dtype))
            # Megatron's word for a parameter that all data-parallel ranks have.
            weight.allreduce = config.expert_model_parallel_size == 1
            if ranks > 1:
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=self.split, stride=1)
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, hidden: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        parts = zip(hidden.split(tokens_per_expert), self.parameters(), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts]), None


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    """The first of an expert's two."""

    split = 0


class TERowParallelGroupedLinear(TEGroupedLinear):
    """The second."""

    split = 1
