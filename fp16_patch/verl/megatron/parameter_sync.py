"""Parameters that are gathered late: with `overlap_param_gather`, ranks have them all in the next forward pass.

Until then each data-parallel rank has the part that its optimizer stepped, and of the rest what was before the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fp16_patch.runtime.activation import current_plan


def export_weights(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronEngine.get_per_tensor_param`: send the sampler the weights as the last step has left them."""
    if current_plan().overrides_dtype:
        gather_parameters(engine.module)
    return wrapped(*args, **kwargs)


def gather_parameters(chunks: Iterable[Any]) -> None:
    """Gather what has not been gathered since the last step. Every rank has to call it."""
    for chunk in chunks:
        config = getattr(chunk, "ddp_config", None)
        if config is not None and config.overlap_param_gather and config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
