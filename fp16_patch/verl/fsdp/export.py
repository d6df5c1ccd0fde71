"""Weights for others to load: exported in the plan's dtype and labelled with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan

logger = logging.getLogger(__name__)

_LABELS = ("dtype", "torch_dtype")


def full_state_dict(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`get_fsdp_full_state_dict`, called for `hf_model` checkpoints only: round the FP32 masters once."""
    state: dict[str, Any] = wrapped(*args, **kwargs)
    return in_plan_dtype(state) if current_plan().overrides_dtype else state


def save_checkpoint(wrapped: Any, manager: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPCheckpointManager.save_checkpoint`: write the weights' dtype into its Hugging Face folder."""
    result = wrapped(*args, **kwargs)
    if current_plan().overrides_dtype and manager.should_save_hf_model and manager.rank == 0:
        label(Path(argument(wrapped, args, kwargs, "local_path")) / "huggingface")
    return result


def merge_shards(wrapped: Any, merger: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`FSDPModelMerger._load_and_merge_state_dicts`: round each shard to the plan's dtype, not to bfloat16."""
    if not current_plan().overrides_dtype:
        return wrapped(*args, **kwargs)  # type: ignore[no-any-return]
    with _bfloat16_means_plan_dtype():
        return wrapped(*args, **kwargs)  # type: ignore[no-any-return]


def save_merged(wrapped: Any, merger: Any, args: Any, kwargs: Any) -> Any:
    """`BaseModelMerger.save_hf_model_and_tokenizer`: write the merged model's dtype into its config.json."""
    result = wrapped(*args, **kwargs)
    if current_plan().overrides_dtype:
        label(Path(merger.config.target_dir))
    return result


def in_plan_dtype(state: dict[str, Any]) -> dict[str, Any]:
    """Round the floating-point tensors of a state dict to the plan's dtype; what is out of its range stays as it is."""
    return {name: _rounded(name, value) for name, value in state.items()}


def label(model_dir: Path) -> None:
    """Write the plan's dtype into a model folder's config.json."""
    path = model_dir / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in _LABELS:
        if name in config:
            config[name] = current_plan().dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rounded(name: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    rounded = value.to(current_plan().torch_dtype)
    if rounded.isinf().any() and not value.isinf().any():
        # Only rank 0 exports; raising here would leave the others at a barrier.
        largest = value.abs().max().item()
        logger.warning("%s holds %g, out of %s's range: exported in %s", name, largest, rounded.dtype, value.dtype)
        return value
    return rounded


@contextmanager
def _bfloat16_means_plan_dtype() -> Iterator[None]:
    # The merger rounds with `tensor.bfloat16()` deep inside one long function, and does nothing else with it.
    bfloat16 = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda tensor: _rounded("a weight", tensor)
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = bfloat16
