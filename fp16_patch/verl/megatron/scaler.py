"""Megatron's loss scalers of one optimizer, asked and set as torch's scaler is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

_SCALE, _GROWTH = "scale", "_growth_tracker"
_LOADED = "_fp16_patch_loaded"


class ScalerState(NamedTuple):
    """What the steps of a run change in one of Megatron's scalers."""

    scale: torch.Tensor
    growth: int
    hysteresis: int

    @classmethod
    def of(cls, scaler: Any) -> ScalerState:
        return cls(scaler._scale.clone(), scaler._growth_tracker, scaler._hysteresis_tracker)

    def restore(self, scaler: Any) -> None:
        scaler._scale, scaler._growth_tracker, scaler._hysteresis_tracker = self.scale.clone(), *self[1:]


def level(scalers: Sequence[Any]) -> None:
    """Bring the scalers of a chained optimizer to the lowest scale among them.

    Each looks at its own gradients only. If those of the experts overflow and the others do not, the loss goes on being
    multiplied by the scale of the others, and the experts' gradients are divided by theirs.
    """
    states = [ScalerState.of(scaler) for scaler in scalers]
    lowest = min((state.scale for state in states), key=float)
    one = ScalerState(lowest, min(state.growth for state in states), min(state.hysteresis for state in states))
    for scaler in scalers:
        one.restore(scaler)


def fit_loads(scaler: Any, growth_interval: int) -> None:
    """Keep what Megatron's checkpoints put into a scaler below this interval, and note that they did.

    The scale grows when the count equals the interval: one beyond it would grow never.
    """
    load = scaler.load_state_dict

    def load_state_dict(state: Mapping[str, Any]) -> None:
        load(state)
        scaler._growth_tracker = min(scaler._growth_tracker, growth_interval - 1)
        setattr(scaler, _LOADED, True)

    scaler.load_state_dict = load_state_dict


def was_loaded(scaler: Any) -> bool:
    """Return whether a checkpoint has put a state into it since this was last asked."""
    return bool(vars(scaler).pop(_LOADED, False))


class MegatronScaler:
    """The scalers of an optimizer, one a part, which are at one scale.

    It holds nothing of its own: what is read is the first's, which losses are multiplied by, and what is set is set in
    all.

    Args:
        scalers: Megatron's `DynamicGradScaler`s, at least one.
    """

    def __init__(self, scalers: Sequence[Any]) -> None:
        self.scalers = scalers

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return float(self.scalers[0].scale.item())

    def get_growth_factor(self) -> float:
        return float(self.scalers[0].growth_factor.item())

    def get_growth_interval(self) -> int:
        return int(self.scalers[0].growth_interval)

    def _get_growth_tracker(self) -> int:
        return int(self.scalers[0]._growth_tracker)

    def state_dict(self) -> dict[str, Any]:
        """Return scale and growth counter, under the names that they have in torch's."""
        return {_SCALE: self.get_scale(), _GROWTH: self._get_growth_tracker()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a scale and a growth counter; the next overflow lowers the scale."""
        for scaler in self.scalers:
            ScalerState(torch.full_like(scaler.scale, state[_SCALE]), state[_GROWTH], hysteresis=1).restore(scaler)
