"""Step counters and scaler settings beside DeepSpeed's checkpoints, which hold the loss scale itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from fp16_patch.openrlhf.deepspeed.step import DeepSpeedStep
from fp16_patch.patching.call_arguments import argument, bound
from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.agreed_state import agree
from fp16_patch.scaling.saved_state import DEEPSPEED_SCALER, SavedState, Values, history_of, values_of
from fp16_patch.untrusted.reading import Unreadable
from fp16_patch.untrusted.text import quoted

logger = logging.getLogger(__name__)

_KEY = "fp16_patch"
_SCALER, _COUNTERS = "loss scale", "step counters"


def save_ckpt(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> Any:
    """`DeepspeedStrategy.save_ckpt`: save the step counters in the client state."""
    engine = argument(wrapped, args, kwargs, "model")
    call = bound(wrapped, args, kwargs)
    call.arguments["client_state"] = {
        **(call.arguments.get("client_state") or {}),
        _KEY: {"history": DeepSpeedStep.of(engine).history.state_dict()},
    }
    return wrapped(*call.args, **call.kwargs)


def load_ckpt(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> Any:
    """`DeepspeedStrategy.load_ckpt`: go on with the saved scale; window, hysteresis and floor are the plan's.

    DeepSpeed restores the whole scaler, settings of the run that saved it included. Of that one the numbers are read,
    and given to the scaler that was built for this run.
    """
    engine = argument(wrapped, args, kwargs, "model")
    fresh = getattr(engine.optimizer, "loss_scaler", None)
    path, states = wrapped(*args, **kwargs)
    if not current_plan().scales_loss:
        return path, states
    # On every rank, also on one that has found no checkpoint.
    found = SavedState() if path is None else _found(engine.optimizer.loss_scaler, states)
    saved, differ = agree(found)
    engine.optimizer.loss_scaler, engine.optimizer.dynamic_loss_scale = fresh, True
    step = DeepSpeedStep.of(engine)
    if saved.scaler is not None:
        vars(fresh).update(_under_the_plan(saved.scaler))
    if saved.history is not None:
        step.resume(saved.history)
    if torch.distributed.get_rank() == 0:
        _warn(step.role, str(path), saved, differ)
    return path, states


def _found(scaler: Any, states: Mapping[str, Any]) -> SavedState:
    """Return what one rank's checkpoint holds. A bf16 run saves a scaler too, one that never scales."""
    problems: dict[str, str] = {}
    numbers = history = None
    try:
        if not getattr(scaler, "dynamic", False):
            raise Unreadable("there is none (saved by a run that scaled no loss?)")
        numbers = values_of(vars(scaler), DEEPSPEED_SCALER)
    except Unreadable as problem:
        problems[_SCALER] = str(problem)
    try:
        ours = states.get(_KEY)
        if not isinstance(ours, Mapping) or "history" not in ours:
            raise Unreadable("there are none (saved without fp16_patch?)")
        history = history_of(ours["history"])
    except Unreadable as problem:
        problems[_COUNTERS] = str(problem)
    return SavedState(numbers, history, problems)


def _under_the_plan(saved: Values) -> Mapping[str, Any]:
    plan = current_plan()
    return {
        **saved,
        "cur_scale": max(saved["cur_scale"], float(int(plan.min_scale))),
        "cur_hysteresis": min(saved["cur_hysteresis"], plan.hysteresis),
    }


def _warn(role: str, path: str, saved: SavedState, differ: bool) -> None:
    """Say in one warning what could not be used, and what the run goes on with."""
    if not saved.problems and not differ:
        return
    plan = current_plan()
    scale = saved.scaler["cur_scale"] if saved.scaler is not None else None
    logger.warning(
        "%s: of the checkpoint %s not all can be used%s: %s. On every rank the loss scale %s, and step counters %s",
        role,
        quoted(path),
        ", and ranks read different numbers" if differ else "",
        saved.listed_problems() or "the lowest rank's count",
        f"starts at {plan.init_scale:g}" if scale is None else f"goes on at {scale:g}",
        "start at 0" if saved.history is None else "go on",
    )
