"""What the ranks of a job tell each other about an update."""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T")


def gather(own: T) -> list[T]:
    """Return what every rank passes, in the order of ranks. All ranks have to call it."""
    of_ranks = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, own)
    return of_ranks


def all_ranks(fact: bool) -> bool:
    """Return whether it holds on every rank."""
    return all(gather(fact))
