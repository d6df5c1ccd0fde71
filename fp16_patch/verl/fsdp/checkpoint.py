"""The loss scaler's state beside verl's checkpoints: one small file a rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.optimizer_step import OptimizerStep
from fp16_patch.verl.fsdp.update import FSDPUpdate

logger = logging.getLogger(__name__)

_VERSION = 1
_STATE = ("scale", "_growth_tracker")


def save_checkpoint(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPEngine.save_checkpoint`: save the scale, its growth counter and the step counters with the model."""
    return save_with_scaler(FSDPUpdate.of(engine), wrapped, args, kwargs)


def load_checkpoint(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPEngine.load_checkpoint`: go on with the saved scale; its factors and interval are the plan's."""
    return load_with_scaler(FSDPUpdate.of(engine), wrapped, args, kwargs)


def save_with_scaler(step: OptimizerStep | None, save: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Save as verl does, and beside it the history of an engine's steps and the state of its scaler, if it has one."""
    result = save(*args, **kwargs)
    if _has_scaler(step):
        state = step.scaler.state_dict()
        saved = {
            "version": _VERSION,
            "scaler": {name: state[name] for name in _STATE},
            "history": step.history.state_dict(),
        }
        path = _state_file(argument(save, args, kwargs, "local_path"))
        path.write_text(json.dumps(saved), encoding="utf-8")
    return result


def load_with_scaler(step: OptimizerStep | None, load: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Load as verl does, and what was saved beside it into the scaler and the history of an engine's steps."""
    path = argument(load, args, kwargs, "local_path")
    # Read first: verl may delete the local copy after loading it.
    saved = _agreed_state(path) if path is not None and _has_scaler(step) else None
    result = load(*args, **kwargs)
    if saved is not None and _has_scaler(step):
        step.scaler.load_state_dict({**step.scaler.state_dict(), **saved["scaler"]})
        step.resume(saved["history"])
    return result


def _has_scaler(step: OptimizerStep | None) -> TypeGuard[OptimizerStep]:
    return step is not None and step.scaler is not None and current_plan().overrides_dtype


def _state_file(local_path: str) -> Path:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Path(local_path) / f"fp16_patch_scaler_world_size_{world_size}_rank_{rank}.json"


def _agreed_state(local_path: str) -> dict[str, Any] | None:
    """Return what rank 0 finds, on every rank: with different scales they would add up gradients of different size."""
    found = [_read_state(Path(local_path)) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _read_state(local_path: Path) -> dict[str, Any] | None:
    # The scale is the same on all ranks, so a run resumed on another number of ranks can take any of the files.
    for path in [_state_file(str(local_path)), *sorted(local_path.glob("fp16_patch_scaler_*.json"))]:
        if path.is_file():
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if saved["version"] == _VERSION:
                return saved
    logger.warning(
        "no loss-scaler state in %s that this version can read (saved without fp16_patch?); the scale starts as in a "
        "new run (first_scale=%s, init_scale=%g)",
        local_path,
        current_plan().first_scale,
        current_plan().init_scale,
    )
    return None
