"""Step counters and scaler settings beside DeepSpeed's checkpoints, which hold the loss scale itself."""

from __future__ import annotations

import logging
from typing import Any

from fp16_patch.openrlhf.deepspeed.step import DeepSpeedStep
from fp16_patch.patching.call_arguments import argument, bound
from fp16_patch.runtime.activation import current_plan

logger = logging.getLogger(__name__)

_KEY = "fp16_patch"


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
    """`DeepspeedStrategy.load_ckpt`: go on with the saved scale; window, hysteresis and floor are the plan's."""
    engine = argument(wrapped, args, kwargs, "model")
    fresh = getattr(engine.optimizer, "loss_scaler", None)
    path, states = wrapped(*args, **kwargs)
    if path is None or not current_plan().scales_loss:
        return path, states
    step = DeepSpeedStep.of(engine)
    if _KEY in states:
        step.resume(states[_KEY]["history"])
    else:
        logger.warning("%s: no step counters in %s (saved without fp16_patch?); they start at 0", step.role, path)
    if engine.optimizer.loss_scaler.dynamic:
        _resettle(engine)
    else:
        # A bf16 run saves a scaler too, one that never scales.
        logger.warning("%s: %s has no loss scale; it starts at %g", step.role, path, current_plan().init_scale)
        engine.optimizer.loss_scaler, engine.optimizer.dynamic_loss_scale = fresh, True
    return path, states


def _resettle(engine: Any) -> None:
    """Put back the plan's settings: DeepSpeed restores the whole scaler, settings of the run that saved it included."""
    plan, scaler = current_plan(), engine.optimizer.loss_scaler
    scaler.scale_window, scaler.min_scale = plan.growth_interval, int(plan.min_scale)
    scaler.delayed_shift, scaler.cur_hysteresis = plan.hysteresis, min(scaler.cur_hysteresis, plan.hysteresis)
