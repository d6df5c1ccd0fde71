"""Megatron's checkpoints: the state of the loss scaler beside them, and an optimizer that can be loaded again.

Megatron saves the scale with the optimizer. What it does not save is how many steps were taken and skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.optimizer_step import start_anew
from fp16_patch.scaling.saved_state import is_scale
from fp16_patch.scaling.scaler import usable_scale
from fp16_patch.verl.fsdp.checkpoint import load_with_scaler, save_with_scaler
from fp16_patch.verl.megatron.dtypes import parts_of
from fp16_patch.verl.megatron.parameter_sync import gather_parameters
from fp16_patch.verl.megatron.scaler import level, was_loaded
from fp16_patch.verl.megatron.update import MegatronUpdate

_SET_STATE = "_set_main_param_and_optimizer_states"


def save_checkpoint(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronEngine.save_checkpoint`: save weights as the last step has left them, and the history of steps."""
    if current_plan().overrides_dtype:
        gather_parameters(engine.module)
    return save_with_scaler(_update_of(engine), wrapped, args, kwargs)


def load_checkpoint(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronEngine.load_checkpoint`: load what its optimizer has saved, and go on with scale and history."""
    if not current_plan().overrides_dtype or engine.optimizer is None:
        return wrapped(*args, **kwargs)
    # The schedule goes forward by as many steps as it had taken; one that waits for a step that is taken would not.
    for owner in (engine.optimizer, engine):
        start_anew(owner)
    update = MegatronUpdate.of_engine(engine)
    with _tensors_only(parts_of(engine.optimizer)):
        return load_with_scaler(update, wrapped, args, kwargs, partial(_keep_scale, update))


def _update_of(engine: Any) -> MegatronUpdate | None:
    return None if engine.optimizer is None else MegatronUpdate.of_engine(engine)


def _keep_scale(update: MegatronUpdate) -> bool:
    """Go on at the scale that Megatron has loaded, of a run without the history of its steps; say whether there is one.

    A run in another dtype has saved none, and then one is measured as in a new run.
    """
    loaded = [was_loaded(scaler) for scaler in update.scalers]
    if not any(loaded) or not all(is_scale(float(scaler.scale)) for scaler in update.scalers):
        return False
    level(update.scalers)
    update.set_loss_scale(usable_scale(float(update.scalers[0].scale), current_plan()))
    update.scale_is_known = True
    return True


@contextmanager
def _tensors_only(parts: Iterable[Any]) -> Iterator[None]:
    """Keep from the optimizers, while they load, what their checkpoints hold beside tensors.

    In the default format Megatron marks what is padding. TransformerEngine's optimizer, which verl takes for FP16, is
    handed the mark as if it were one more of its tensors, and fails.
    """
    patched = [part for part in parts if hasattr(part, _SET_STATE)]
    for part in patched:
        setattr(part, _SET_STATE, _of_tensors(getattr(part, _SET_STATE)))
    try:
        yield
    finally:
        for part in patched:
            delattr(part, _SET_STATE)


def _of_tensors(set_state: Callable[..., Any]) -> Callable[..., Any]:
    def call(parameter: Any, tensors: dict[str, Any]) -> Any:
        return set_state(parameter, {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)})

    return call
