"""SFT, DPO and reward-model training: no sampler and no driver, so each process speaks for itself."""

from __future__ import annotations

from typing import Any

from fp16_patch.openrlhf.deepspeed.engines import inner
from fp16_patch.patching.call_arguments import argument
from fp16_patch.scaling.optimizer_step import history_of


def save_logs_and_checkpoints(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`SFTTrainer`, `DPOTrainer` and `RewardModelTrainer.save_logs_and_checkpoints`: log the step's outcome."""
    logs = argument(wrapped, args, kwargs, "logs_dict")
    if logs is not None:
        logs.update(history_of(inner(trainer.model)).metrics())
    return wrapped(*args, **kwargs)
