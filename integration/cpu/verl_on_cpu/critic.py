"""The critic: loaded with an attention that runs on a CPU."""

from __future__ import annotations

from types import ModuleType

import torch
import transformers
import wrapt


def install() -> None:
    wrapt.register_post_import_hook(load_critics_with_sdpa, "verl.utils.model")


def load_critics_with_sdpa(model: ModuleType) -> None:
    """verl hard-codes flash_attention_2 for a value head, whatever the config says, and flash-attn is CUDA only."""
    model.load_valuehead_model = load_valuehead_model


def load_valuehead_model(
    local_path: str, torch_dtype: torch.dtype, model_config: transformers.PretrainedConfig, trust_remote_code: bool
) -> transformers.PreTrainedModel:
    return transformers.AutoModelForTokenClassification.from_pretrained(
        local_path,
        dtype=torch_dtype,
        config=model_config,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )
