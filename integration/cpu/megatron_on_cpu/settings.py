"""What a run on a CPU is told in verl's own keys: no fused kernels, which are CUDA's."""

FUSIONS = (
    "gradient_accumulation_fusion",
    "bias_dropout_fusion",
    "bias_activation_fusion",
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "moe_permute_fusion",
    "persist_layer_norm",
)
OVERRIDE_TRANSFORMER_CONFIG = {**dict.fromkeys(FUSIONS, False), "attention_backend": "unfused"}
"""For `engine_config.override_transformer_config`."""
