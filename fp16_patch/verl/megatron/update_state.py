"""What computing a mini-batch changes besides gradients, to compute it again from where it began."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch

from fp16_patch.scaling.random_state import RandomState


class UpdateState(RandomState):
    """Saves the generators of this process and the buffers of a model, as they are now.

    Megatron's generators are one a purpose: what ranks drop alike, and what each drops by itself. Of the buffers, the
    bias by which a router balances its experts moves with each computation, before the optimizer steps.

    Args:
        device: type of the one that computes.
        chunks: the parts of the model.
    """

    def __init__(self, device: str, chunks: Iterable[Any]) -> None:
        super().__init__(device)
        self._tracker = import_module("megatron.core.tensor_parallel").get_cuda_rng_tracker()
        self._states = {name: _saved(state) for name, state in self._tracker.get_states().items()}
        # Not `buffers`, which is something else on Megatron's DDP.
        self._buffers = [(buffer, buffer.detach().clone()) for chunk in chunks for _, buffer in chunk.named_buffers()]

    def restore(self) -> None:
        super().restore()
        current = self._tracker.get_states()
        self._tracker.set_states({name: _restored(current[name], state) for name, state in self._states.items()})
        for buffer, saved in self._buffers:
            buffer.copy_(saved)


def _saved(state: Any) -> torch.Tensor:
    # A generator, where CUDA graphs draw from it; else the state of one.
    saved: torch.Tensor = state.get_state() if isinstance(state, torch.Generator) else state.clone()
    return saved


def _restored(current: Any, saved: torch.Tensor) -> Any:
    if isinstance(current, torch.Generator):
        current.set_state(saved)
        return current
    return saved.clone()
