"""Parameters that are gathered late: with `overlap_param_gather`, ranks have them all in the next forward pass.

Until then each data-parallel rank has the part that its optimizer stepped, and of the rest what was before the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from fp16_patch.runtime.activation import current_plan


def export_weights(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronEngine.get_per_tensor_param`: send the sampler the weights as the last step has left them."""
    if current_plan().overrides_dtype:
        gather_parameters(engine.module)
    return wrapped(*args, **kwargs)


def gather_parameters(chunks: Iterable[Any]) -> None:
    """Gather what has not been gathered since the last step. Every rank has to call it."""
    late = [chunk for chunk in chunks if _gathers_late(getattr(chunk, "ddp_config", None))]
    if late:
        # What is offloaded has no storage to gather into.
        import_module("verl.utils.megatron_utils").load_megatron_model_to_gpu(late, load_grad=False)
    for chunk in late:
        chunk.start_param_sync(force_sync=True)


def _gathers_late(config: Any) -> bool:
    return config is not None and config.overlap_param_gather and config.use_distributed_optimizer
