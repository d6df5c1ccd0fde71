"""Counts what tensors take while a computation runs, on any device, from the operations that make them."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[misc]  # torch has no types for it
    """Follows the storage of every tensor that an operation in this block makes.

    What an operation takes inside of its kernel is not seen.

    Attributes:
        peak: bytes that were alive at once, of what was made in the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = function(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self._follow(
            [tensor for tensor in results if all(tensor is not each for each in given)],
            {tensor.untyped_storage()._cdata for tensor in given} - self._holders.keys(),
        )
        return made

    def _follow(self, made: Iterable[Tensor], of_others: Collection[int]) -> None:
        """Count new tensors, and new views of what is counted; not views of what came into the block."""
        for tensor in made:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in of_others:
                continue
            if key not in self._holders:
                self._holders[key] = 0
                self._live += size
            self._holders[key] += 1
            self.peak = max(self.peak, self._live)
            weakref.finalize(tensor, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._live -= size
