"""What the ranks of a job tell each other about an update."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def gather(own: T) -> list[T]:
    """Return what every rank passes, in the order of ranks. All ranks have to call it."""
    of_ranks = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, own)
    return of_ranks


def max_over_ranks(found: Tensor) -> Tensor:
    """Return the largest of all ranks' numbers, in place; all ranks have to call it. Without ranks it is the own."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found


def all_ranks(fact: bool) -> bool:
    """Return whether it holds on every rank."""
    return all(gather(fact))
