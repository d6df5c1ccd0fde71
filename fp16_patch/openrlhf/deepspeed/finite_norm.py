"""Keeps DeepSpeed's ZeRO optimizers from a step whose gradients' norm is not finite.

DeepSpeed looks for gradients that are not finite, under ZeRO 3 in FP16 only. Of a group's norm that is not finite it
makes -1, clips by that, and takes the step. So ZeRO 3 steps with NaN in BF16. And ZeRO 2 adds the squares up in FP32:
where these overflow, it steps with finite gradients of any size. ZeRO 3 adds them up in FP64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fp16_patch.scaling.ranks import max_over_ranks

_STEP = "_optimizer_step"
# On the device, and offloaded. Each returns one group's norm over all ranks.
_NORMS = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")


class FiniteNormsOnly:
    """Within the block, an optimizer leaves out the steps of its groups if the norm of one of them is not finite.

    Attributes:
        refused: whether it did, on every rank.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.refused = optimizer, False
        self._norms: list[Any] = []
        self._judged = False
        self._own = {name: getattr(optimizer, name) for name in (*_NORMS, _STEP) if hasattr(optimizer, name)}

    def __enter__(self) -> FiniteNormsOnly:
        for name, method in self._own.items():
            setattr(self.optimizer, name, self._step_of(method) if name == _STEP else self._noted(method))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._own:
            delattr(self.optimizer, name)
        if self.refused:
            # DeepSpeed takes no step while it stands, and sets it back only where it looks for overflows itself.
            self.optimizer.overflow = False

    def _noted(self, norm_of: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            norm = norm_of(*args, **kwargs)
            self._norms.append(norm)
            return norm

        return call

    def _step_of(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._judge()
            return None if self.refused else step(*args, **kwargs)

        return call

    def _judge(self) -> None:
        """Agree with the other ranks, before the first group steps: experts' groups have norms of their own."""
        if self._judged or not self._norms:
            return
        bad = torch.stack([_is_bad(norm) for norm in self._norms]).max()
        self._judged, self.refused = True, bool(max_over_ranks(bad).item())
        if self.refused:
            # The engine counts a skipped step by this, and holds its schedule.
            self.optimizer.overflow = True


def _is_bad(norm: Any) -> torch.Tensor:
    """Return 1 for a norm that is not finite, 0-dim, where ranks communicate from."""
    from deepspeed.accelerator import get_accelerator

    value = torch.as_tensor(norm)
    return (value.isfinite() & (value >= 0)).logical_not().to(get_accelerator().current_device_name(), torch.float32)
