"""The loss scaler's state beside verl's checkpoints: one small file a rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.agreed_state import agree
from fp16_patch.scaling.optimizer_step import OptimizerStep
from fp16_patch.scaling.saved_state import (
    TORCH_SCALER,
    Kind,
    SavedState,
    Values,
    history_of,
    values_of,
    write_whole,
)
from fp16_patch.untrusted.paths import reason_of
from fp16_patch.untrusted.reading import read_json
from fp16_patch.untrusted.text import quoted
from fp16_patch.verl.fsdp.update import FSDPUpdate

logger = logging.getLogger(__name__)

_VERSION = 1
_OF_THIS_VERSION = {"version": Kind((int,), _VERSION, _VERSION, f"version {_VERSION}")}
_PREFIX, _SUFFIX = "fp16_patch_scaler_", ".json"
_MOST_BYTES = 2**16
# Beside a rank's own; each would be read by every rank.
_MOST_OTHERS = 16


def save_checkpoint(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`save_checkpoint` of the FSDP engine and VeOmni's: save the scale, its growth counter and the step counters."""
    return save_with_scaler(FSDPUpdate.of(engine), wrapped, args, kwargs)


def load_checkpoint(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`load_checkpoint` of the FSDP engine and VeOmni's: go on with the saved scale, and the plan's factors."""
    return load_with_scaler(FSDPUpdate.of(engine), wrapped, args, kwargs)


def save_with_scaler(step: OptimizerStep | None, save: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Save as verl does, and beside it the history of an engine's steps and the state of its scaler, if it has one.

    Where that cannot be written the run goes on: it has all that verl saves, and resumes with another rank's scale or
    a new one.
    """
    result = save(*args, **kwargs)
    if _has_scaler(step):
        state = step.scaler.state_dict()
        saved = {
            "version": _VERSION,
            "scaler": {name: state[name] for name in TORCH_SCALER},
            "history": step.history.state_dict(),
        }
        path = _state_file(argument(save, args, kwargs, "local_path"))
        try:
            write_whole(path, saved)
        except OSError as problem:
            logger.warning("the loss-scaler state is not in the checkpoint, training goes on: %s", problem)
    return result


def load_with_scaler(
    step: OptimizerStep | None,
    load: Callable[..., Any],
    args: Any,
    kwargs: Any,
    keep_scale: Callable[[], bool] = lambda: False,
) -> Any:
    """Load as verl does, and what was saved beside it into the scaler and the history of an engine's steps.

    Args:
        keep_scale: called where nothing was saved beside it; go on with a scale that `load` itself has found, and say
            whether it has.
    """
    path = argument(load, args, kwargs, "local_path")
    if path is None or not _has_scaler(step):
        return load(*args, **kwargs)
    # Read first: verl may delete the local copy after loading it.
    saved, differ = agree(_found_in(path))
    result = load(*args, **kwargs)
    if saved.scaler is not None and saved.history is not None:
        step.scaler.load_state_dict({**step.scaler.state_dict(), **_under_the_plan(saved.scaler)})
        step.resume(saved.history)
    kept = step.loss_scale() if saved.scaler is None and keep_scale() else None
    if torch.distributed.get_rank() == 0:
        _warn(path, saved, differ, kept)
    return result


def _has_scaler(step: OptimizerStep | None) -> TypeGuard[OptimizerStep]:
    return step is not None and step.scaler is not None and current_plan().overrides_dtype


def _under_the_plan(saved: Values) -> dict[str, Any]:
    # torch's scale grows when the count equals the interval: one beyond it would grow never.
    plan = current_plan()
    return {
        "scale": max(saved["scale"], plan.min_scale),
        "_growth_tracker": min(saved["_growth_tracker"], plan.growth_interval - 1),
    }


def _state_file(local_path: str) -> Path:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Path(local_path) / f"{_PREFIX}world_size_{world_size}_rank_{rank}{_SUFFIX}"


def _found_in(local_path: str) -> SavedState:
    """Return the state in this rank's file, else in the first of another rank's that can be read.

    The scale is the same on all ranks, so a run resumed on another number of ranks can take any of the files.
    """
    problems: dict[str, str] = {}
    own = _state_file(local_path)
    for path in [own, *_others(own)]:
        try:
            return replace(_read(path), problems=problems)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as problem:
            problems[str(path)] = reason_of(problem)
    return SavedState(problems=problems)


def _read(path: Path) -> SavedState:
    content = read_json(path, _MOST_BYTES)
    values_of(content, _OF_THIS_VERSION)
    return SavedState(values_of(content.get("scaler"), TORCH_SCALER), history_of(content.get("history")))


def _others(own: Path) -> list[Path]:
    try:
        found = sorted(path for path in own.parent.iterdir() if path.match(f"{_PREFIX}*{_SUFFIX}"))
    except OSError:
        return []
    return [path for path in found if path != own][:_MOST_OTHERS]


def _warn(local_path: str, saved: SavedState, differ: bool, kept: float | None) -> None:
    """Say once what was missing or damaged, and what it means.

    Args:
        kept: the scale that the framework's own checkpoint had.
    """
    plan, problems = current_plan(), saved.listed_problems()
    if kept is not None:
        logger.warning(
            "no loss-scaler state of fp16_patch in %s (saved without it?); the scale is that of the optimizer's own "
            "checkpoint, %g, and steps are counted anew%s",
            quoted(local_path),
            kept,
            f". {problems}" if problems else "",
        )
    elif saved.scaler is None:
        logger.warning(
            "no loss-scaler state in %s that this version can read (saved without fp16_patch?); the scale starts as in "
            "a new run (first_scale=%s, init_scale=%g)%s",
            quoted(local_path),
            plan.first_scale,
            plan.init_scale,
            f". {problems}" if problems else "",
        )
    elif problems or differ:
        reasons = [problems, "ranks read different states" if differ else ""]
        logger.warning(
            "the loss-scaler state is that of the lowest rank that could read one, on every rank: scale %g. %s",
            saved.scaler["scale"],
            "; ".join(filter(None, reasons)),
        )
