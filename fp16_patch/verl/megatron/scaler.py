"""Megatron's loss scalers of one optimizer, asked and set as torch's scaler is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_SCALE, _GROWTH = "scale", "_growth_tracker"


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
            scaler._scale = torch.full_like(scaler.scale, state[_SCALE])
            scaler._growth_tracker = state[_GROWTH]
            scaler._hysteresis_tracker = 1
