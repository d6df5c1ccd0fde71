"""Which layers Megatron builds a model of: its own, with those of TransformerEngine that the bridges look for."""

import functools
from types import ModuleType
from typing import Any

import wrapt


def install() -> None:
    wrapt.register_post_import_hook(name_layers_as_the_bridges_do, "megatron.core.models.gpt.gpt_layer_specs")


def name_layers_as_the_bridges_do(specs: ModuleType) -> None:
    stock = specs.get_gpt_decoder_block_spec

    @functools.wraps(stock)  # bridges look at the signature
    def block_spec(config: Any, use_transformer_engine: bool = False, **kwargs: Any) -> Any:
        from megatron_on_cpu.layers import TENorm

        block = stock(config, use_transformer_engine=False, **{**kwargs, "normalization": "RMSNorm"})
        block.layer_norm = TENorm
        for layer in block.layer_specs:
            complete(layer.submodules, config)
        return block

    stock_mtp = specs.get_gpt_mtp_block_spec

    @functools.wraps(stock_mtp)
    def mtp_block_spec(config: Any, spec: Any, use_transformer_engine: bool = False, **kwargs: Any) -> Any:
        from megatron_on_cpu.layers import TENorm

        block = stock_mtp(config, spec, use_transformer_engine=False, **kwargs)
        for head in block.layer_specs if block else ():
            head.submodules.enorm = head.submodules.hnorm = head.submodules.layer_norm = TENorm
        return block

    specs.get_gpt_decoder_block_spec, specs.get_gpt_mtp_block_spec = block_spec, mtp_block_spec


def complete(parts: Any, config: Any) -> None:
    """Give a layer the classes that TransformerEngine's specification gives it."""
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron_on_cpu.attention import TEDotProductAttention
    from megatron_on_cpu.layers import (
        TEColumnParallelGroupedLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelGroupedLinear,
    )

    attention = parts.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = TENorm
    parts.input_layernorm = IdentityOp
    attention.linear_qkv = TELayerNormColumnParallelLinear
    attention.core_attention = TEDotProductAttention
    if isinstance(parts.mlp.submodules, MoESubmodules):
        parts.pre_mlp_layernorm = TENorm
        grouped = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        parts.mlp.submodules.experts = ModuleSpec(TEGroupedMLP, submodules=grouped)
    else:
        parts.pre_mlp_layernorm = IdentityOp
        parts.mlp.submodules.linear_fc1 = TELayerNormColumnParallelLinear
