"""The loss scaler's state beside verl's checkpoints: one small file a rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling import scale_growth
from fp16_patch.scaling.optimizer_step import history_of
from fp16_patch.verl.fsdp.engine import scaler_of

logger = logging.getLogger(__name__)

_VERSION = 1
_STATE = ("scale", "_growth_tracker")


def save_checkpoint(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPEngine.save_checkpoint`: the scale, its growth counter and the step counters go with the model."""
    return save_with_scaler(engine, wrapped, args, kwargs)


def load_checkpoint(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPEngine.load_checkpoint`: go on with the saved scale; its factors and interval are the plan's."""
    return load_with_scaler(engine, wrapped, args, kwargs)


def save_with_scaler(owner: Any, save: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Save as verl does, and beside it the state of the scaler that `owner` has."""
    result = save(*args, **kwargs)
    if scaler_of(owner) is not None and current_plan().overrides_dtype:
        state = owner.scaler.state_dict()
        saved = {
            "version": _VERSION,
            "scaler": {name: state[name] for name in _STATE},
            "history": history_of(owner).state_dict(),
        }
        _state_file(_path_of(args, kwargs)).write_text(json.dumps(saved), encoding="utf-8")
    return result


def load_with_scaler(owner: Any, load: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Load as verl does, and what was saved beside it into the scaler that `owner` has."""
    path = _path_of(args, kwargs)
    # Read first: verl may delete the local copy after loading it.
    wanted = path is not None and scaler_of(owner) is not None and current_plan().overrides_dtype
    saved = _agreed_state(path) if wanted else None
    result = load(*args, **kwargs)
    if saved is not None:
        owner.scaler.load_state_dict({**owner.scaler.state_dict(), **saved["scaler"]})
        history_of(owner).load_state_dict(saved["history"])
        scale_growth.forget(owner)
    return result


def _path_of(args: Any, kwargs: Any) -> Any:
    return kwargs["local_path"] if "local_path" in kwargs else args[0]


def _state_file(local_path: str) -> Path:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Path(local_path) / f"fp16_patch_scaler_world_size_{world_size}_rank_{rank}.json"


def _agreed_state(local_path: str) -> dict[str, Any] | None:
    """What rank 0 finds, on every rank: ranks that scale differently would add up gradients of different size."""
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
