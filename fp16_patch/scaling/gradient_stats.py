"""The FP16 gradients of one update: how near the largest is to overflow, and how many underflow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fp16_patch.scaling.ranks import gather
from fp16_patch.scaling.tensor_range import (
    FP16_MAX,
    FP16_SMALLEST_NORMAL,
    OUTPUT,
    AbsMaxHooks,
    largest_gradient,
    local_part,
)

EMBEDDING, LAYERS, HEAD = "embedding", ("early_layers", "middle_layers", "late_layers"), "head"

SAMPLED_ELEMENTS, SAMPLED_ROWS = 1 << 14, 8
"""Of each gradient, evenly spread rows of at least so many elements together, and at least so many rows."""


class GradientCounts(NamedTuple):
    """Elements of gradients in FP16, scaled as they are computed, before anything unscales them.

    A row, along the last dimension, that is zero throughout is what the gradient of a masked token, of a token with
    advantage 0, or of a word that does not occur is, at any scale. So its zeros are not taken for underflow, and such
    rows are counted apart. The price: a row that underflows throughout is among them.

    Attributes:
        elements: in rows that hold a number other than zero.
        underflown: of these, zero or below 2**-14, where FP16 has fewer than its 11 bits.
        zeros: of these, zero.
        rows: all of them.
        zero_rows: those that are zero throughout.
    """

    elements: float = 0.0
    underflown: float = 0.0
    zeros: float = 0.0
    rows: float = 0.0
    zero_rows: float = 0.0

    def plus(self, other: GradientCounts) -> GradientCounts:
        return GradientCounts(*(one + more for one, more in zip(self, other, strict=True)))

    def shares(self) -> dict[str, float]:
        """Return `underflow` and `zeros` as shares of `elements`, `zero_rows` of `rows`; none of nothing."""
        of_elements = {"underflow": self.underflown, "zeros": self.zeros} if self.elements else {}
        of_rows = {"zero_rows": self.zero_rows / self.rows} if self.rows else {}
        return {**{name: count / self.elements for name, count in of_elements.items()}, **of_rows}


@dataclass(frozen=True)
class GradientStats:
    """The FP16 gradients of an update, of all ranks together.

    Attributes:
        scale: the loss scale it was computed with.
        largest: the largest |scaled gradient|; infinite where one is not finite.
        counts: by group of modules, as `groups_of` names them.
    """

    scale: float
    largest: float
    counts: Mapping[str, GradientCounts]

    @property
    def unscaled(self) -> float:
        return self.largest / self.scale

    @property
    def headroom(self) -> float:
        """65504 ÷ the largest scaled gradient: so many times larger it would overflow. Infinite where all are 0."""
        return FP16_MAX / self.largest if self.largest else math.inf

    def metrics(self) -> dict[str, float]:
        """Return `fp16/gradient_headroom/min`, `fp16/underflow/GROUP`, `fp16/zeros/GROUP`, `fp16/zero_rows/GROUP`."""
        shares = {
            f"fp16/{name}/{group}": share
            for group, counts in self.counts.items()
            for name, share in counts.shares().items()
        }
        # verl reduces over mini-batches by name.
        return {**({"fp16/gradient_headroom/min": self.headroom} if self.largest else {}), **shares}


class GradientStatsHooks(AbsMaxHooks):
    """Records the largest gradient of every module, and counts how many of those of leaf modules underflow.

    Only modules without children are counted, as one with children often returns what its last child returned.

    Args:
        groups: module → group, of those that are counted; by default as `groups_of` finds them.
    """

    def __init__(self, model: nn.Module, groups: Mapping[nn.Module, str] | None = None) -> None:
        super().__init__(model)
        self._groups = groups_of(model) if groups is None else groups
        self._counted: dict[str, Tensor] = {}

    def counts(self) -> dict[str, GradientCounts]:
        """Return this rank's counts by group."""
        return {group: GradientCounts(*counted.tolist()) for group, counted in self._counted.items()}

    def record(self, name: str, module: nn.Module, kind: str, value: Tensor) -> None:
        if kind == OUTPUT:
            return  # says nothing about the loss scale
        super().record(name, module, kind, value)
        group, local = self._groups.get(module), local_part(value)
        if group is not None and local.dtype is torch.float16 and local.numel():
            counted = _counted(local)
            self._counted[group] = self._counted[group] + counted if group in self._counted else counted


def stats_of_all_ranks(scale: float, hooks: GradientStatsHooks) -> GradientStats:
    """Return what an update's hooks have recorded, of all ranks together.

    Args:
        scale: the loss scale that the update was computed with.
    """
    of_ranks = gather((largest_gradient(hooks.largest(), torch.float16), hooks.counts()))
    counts: dict[str, GradientCounts] = {}
    for group in (EMBEDDING, *LAYERS, HEAD):
        of_group = [counted[group] for _, counted in of_ranks if group in counted]
        if of_group:
            total = GradientCounts()
            for counted in of_group:
                total = total.plus(counted)
            counts[group] = total
    return GradientStats(scale, max(largest for largest, _ in of_ranks), counts)


def groups_of(model: nn.Module) -> dict[nn.Module, str]:
    """Return the group of every module without children: `embedding`, a third of its stack of layers, or `head`.

    A stack is a `ModuleList` that lies in no other. What comes before the last one, in the order in which the model
    names its modules, is `embedding` (so is what connects two stacks); what comes behind it is `head`.
    """
    stacks: list[nn.ModuleList] = []
    groups: dict[nn.Module, str] = {}
    outside: list[tuple[nn.Module, int]] = []
    for _, module in model.named_modules():
        if module in groups:
            continue
        if isinstance(module, nn.ModuleList) and len(module):
            stacks.append(module)
            groups.update(_thirds(module))
        elif next(module.children(), None) is None:
            outside.append((module, len(stacks)))
    groups.update({module: EMBEDDING if before < len(stacks) else HEAD for module, before in outside})
    return {module: group for module, group in groups.items() if next(module.children(), None) is None}


def _thirds(stack: nn.ModuleList) -> dict[nn.Module, str]:
    return {
        module: LAYERS[len(LAYERS) * place // len(stack)]
        for place, layer in enumerate(stack)
        for module in layer.modules()
    }


def _counted(gradient: Tensor) -> Tensor:
    """Return `GradientCounts` as a tensor, from a sample of rows: on the device, so that nobody waits for it."""
    rows = sampled_rows(gradient)
    zero = rows == 0
    alive = ~zero.all(dim=-1, keepdim=True)
    count = alive.sum()
    of_rows = (rows.abs() < FP16_SMALLEST_NORMAL) & alive, zero & alive
    underflown, zeros = (found.sum() for found in of_rows)
    # In the order of `GradientCounts`.
    found = torch.stack(
        [count * rows.shape[1], underflown, zeros, torch.full_like(count, len(rows)), len(rows) - count]
    )
    return found.double() * (gradient.numel() / rows.numel())


def sampled_rows(gradient: Tensor) -> Tensor:
    """Return rows along the last dimension, evenly spread, without a copy of the rest; shape (rows, width)."""
    width = gradient.shape[-1] if gradient.dim() else 1
    count = gradient.numel() // width
    every = count // max(SAMPLED_ROWS, math.ceil(SAMPLED_ELEMENTS / width))
    if every < 2:
        return gradient.reshape(count, width)
    # Odd: of sequences whose length is a power of two, it is not always the same positions.
    places = torch.arange(0, count, every | 1, device=gradient.device)
    index = []
    # torch.unravel_index does the same, and waits for the device.
    for size in reversed(gradient.shape[:-1]):
        index.append(places % size)
        places = places // size
    return gradient[tuple(reversed(index))]
