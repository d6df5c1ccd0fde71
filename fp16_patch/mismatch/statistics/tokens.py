"""Flattens the sampled tokens of a batch into float64 tensors, sequence after sequence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.bins import AFTER_GAP, BEFORE_GAP, LAST_POSITION, bands_of_positions, position_band

POSITIVE_FROM = 0.5
"""A log-prob may come out above 0 by the rounding of its logits, which is below this even in bfloat16."""

CERTAIN_FROM = math.log(0.999)
"""The log-prob from which on a side is certain of a token."""


@dataclass(frozen=True)
class Tokens(ABC):
    """n places of S sequences. A place that holds no finite token has 0 for both log-probs, and is not ``present``.

    Attributes:
        sampler, learner: log μ and log π, float64 (n,).
        d: learner − sampler, float64 (n,).
        present: bool (n,), or None where every place holds a finite token.
        band: int32 (n,), see ``bins.position_band``; the last of several tokens has a band of its own, and so have
            those beside a gap, that is, beside places of the sequence that were not sampled.
        token_ids: integers, of each place of the batch, flat; None where they are not known.
        numbers: int64 (S,), what the sequences are called.
        first: int64 (S,), where in the batch the first sampled token of a sequence is, as an index of its places.
        lengths: int64 (S,), sampled tokens.
        nonfinite: int64 (4, S), sampled tokens whose sampler's, learner's, or either's log-prob is not finite, and
            those whose sampler's is NaN where the learner is certain.
    """

    sampler: Tensor
    learner: Tensor
    d: Tensor
    present: Tensor | None
    band: Tensor
    token_ids: Tensor | None
    numbers: Tensor
    first: Tensor
    lengths: Tensor
    nonfinite: Tensor

    @abstractmethod
    def by_sequence(self, values: Tensor) -> Tensor:
        """Return the sums of values (n,) over each sequence, (S,)."""

    @abstractmethod
    def sequence_at(self, index: Tensor) -> Tensor:
        """Return which of the S sequences the tokens at these of the n places belong to."""

    @abstractmethod
    def place_of(self, index: Tensor) -> Tensor:
        """Return where in the batch these of the n places are."""

    def only_present(self, values: Tensor, otherwise: float = 0.0) -> Tensor:
        """Return the values, replaced where no token is present."""
        return values if self.present is None else torch.where(self.present, values, otherwise)


class PaddedTokens(Tokens):
    """Every place of a two-dimensional batch: shapes depend on no value, which on an accelerator saves waiting."""

    def by_sequence(self, values: Tensor) -> Tensor:
        return values.view(len(self.lengths), -1).sum(1)

    def sequence_at(self, index: Tensor) -> Tensor:
        return index // (len(self.d) // len(self.lengths))

    def place_of(self, index: Tensor) -> Tensor:
        return index


@dataclass(frozen=True)
class PackedTokens(Tokens):
    """Sampled finite tokens only: ``kept`` (S,) of each sequence, from these ``places`` (n,) of the batch."""

    kept: Tensor
    places: Tensor

    def by_sequence(self, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", lengths=self.kept, unsafe=True, initial=0.0)

    def sequence_at(self, index: Tensor) -> Tensor:
        return torch.searchsorted(self.kept.cumsum(0), index, right=True)

    def place_of(self, index: Tensor) -> Tensor:
        return self.places[index]


def padded(sampler: Tensor, learner: Tensor, mask: Tensor, token_ids: Tensor | None, numbers: Tensor) -> PaddedTokens:
    """Lay out all places of a batch of shape (S, tokens), a sequence a row."""
    rows, width = mask.shape
    sampler, learner = sampler.double(), learner.double()
    unusable = [mask & found for found in _unusable(sampler, learner)]
    present = mask & ~unusable[2]
    sampler, learner = (torch.where(present, side, 0.0).flatten() for side in (sampler, learner))
    columns = torch.arange(width, device=mask.device)
    first = torch.where(mask, columns, width).amin(1)
    last = torch.where(mask, columns, -1).amax(1)
    is_last = (columns == last[:, None]) & (last > first)[:, None]
    inside = (columns > first[:, None]) & mask & ~is_last
    # Sampled, inside of the sequence, and the neighbour to this side is not sampled.
    before, after = (inside & ~mask.roll(shift, 1) for shift in (-1, 1))
    band = position_band((columns - first[:, None]).clamp(min=0))
    for places, name in ((before, BEFORE_GAP), (after, AFTER_GAP), (is_last, LAST_POSITION)):
        band = torch.where(places, name, band)
    return PaddedTokens(
        sampler=sampler,
        learner=learner,
        d=learner - sampler,
        present=present.flatten(),
        band=band.flatten(),
        token_ids=None if token_ids is None else token_ids.flatten(),
        numbers=numbers,
        first=first + torch.arange(rows, device=mask.device) * width,
        lengths=mask.sum(1),
        nonfinite=torch.stack([found.sum(1) for found in unusable]),
    )


def _unusable(sampler: Tensor, learner: Tensor) -> list[Tensor]:
    """Return, as bool, what ``Tokens.nonfinite`` counts."""
    nonfinite = [~torch.isfinite(values) for values in (sampler, learner, learner - sampler)]
    return [*nonfinite, torch.isnan(sampler) & (learner >= CERTAIN_FROM)]


def packed(sampler: Tensor, learner: Tensor, mask: Tensor, token_ids: Tensor | None, numbers: Tensor) -> PackedTokens:
    """Lay out the sampled tokens of a batch of shape (S, tokens), a sequence a row."""
    lengths = mask.count_nonzero(dim=1)
    places = None if int(lengths.sum()) == mask.numel() else mask.flatten().nonzero().squeeze(1)
    return _pack(sampler, learner, token_ids, places, lengths, numbers, longest=mask.shape[1])


def packed_by_id(
    sampler: Tensor, learner: Tensor, mask: Tensor, token_ids: Tensor | None, sequence_ids: Tensor
) -> PackedTokens:
    """Lay out the sampled tokens of the sequences that the ids tell apart, wherever they lie in the batch."""
    places = mask.flatten().nonzero().squeeze(1)
    ids, order = sequence_ids.flatten()[places].to(torch.int64).sort(stable=True)
    numbers, lengths = torch.unique_consecutive(ids, return_counts=True)
    return _pack(sampler, learner, token_ids, places[order], lengths, numbers, longest=mask.numel())


def _pack(
    sampler: Tensor,
    learner: Tensor,
    token_ids: Tensor | None,
    places: Tensor | None,
    lengths: Tensor,
    numbers: Tensor,
    longest: int,
) -> PackedTokens:
    """Lay out the tokens at these places, sequence after sequence.

    Args:
        places: flat indices of the sampled tokens, sequence after sequence; None if every place in turn holds one.
        longest: how many places there can be between the first and the last token of a sequence.
    """

    def packed(values: Tensor) -> Tensor:
        return values.flatten() if places is None else values.flatten().index_select(0, places)

    sampler, learner = packed(sampler).double(), packed(learner).double()
    at = torch.arange(len(sampler), device=sampler.device) if places is None else places
    first, band = _positions(at, lengths, longest)
    tokens = PackedTokens(
        sampler=sampler,
        learner=learner,
        d=learner - sampler,
        present=None,
        band=band,
        token_ids=None if token_ids is None else token_ids.flatten(),
        numbers=numbers,
        first=first,
        lengths=lengths,
        nonfinite=lengths.new_zeros(4, len(lengths)),
        kept=lengths,
        places=at,
    )
    # A sum is cheaper than a look at every token, and not finite if one of them is not.
    return tokens if len(at) and math.isfinite(tokens.d.sum()) else _without_nonfinite(tokens)


def _positions(places: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return the first place of each sequence, and the band of each token."""
    ends = lengths.cumsum(0)
    if not len(places):
        return torch.zeros_like(ends), places.int()
    first = places[(ends - lengths).clamp_(max=len(places) - 1)]
    # As many bands as there are places at most: looking them up is cheaper than a logarithm each.
    bands = bands_of_positions(longest, places.device)
    band = bands.index_select(0, places - first.repeat_interleave(lengths))
    _mark_gaps(band, places, ends[ends > 0] - 1)
    band[ends[lengths > 1] - 1] = LAST_POSITION
    return first, band


def _mark_gaps(band: Tensor, places: Tensor, last: Tensor) -> None:
    """Give the tokens beside a gap their bands; a first token keeps its own, and so does one after a gap.

    Args:
        last: which of the tokens are the last ones of their sequences.
    """
    before = (places[1:] - places[:-1]).ne(1)
    before[last[last < len(before)]] = False
    index = before.nonzero().squeeze(1)
    band[index[band[index] != 0]] = BEFORE_GAP
    band[index + 1] = AFTER_GAP


def _without_nonfinite(tokens: PackedTokens) -> PackedTokens:
    """Return the finite ones; if there are none, one place that holds no token: nothing at all has no extremes."""
    unusable = _unusable(tokens.sampler, tokens.learner)
    nonfinite = torch.stack([tokens.by_sequence(found.double()) for found in unusable]).long()
    index = (~unusable[2]).nonzero().squeeze(1)
    kept = tokens.lengths - nonfinite[2]
    if not len(index):
        return _one_absent(replace(tokens, nonfinite=nonfinite, kept=kept))
    return replace(
        tokens,
        sampler=tokens.sampler[index],
        learner=tokens.learner[index],
        d=tokens.d[index],
        band=tokens.band[index],
        nonfinite=nonfinite,
        kept=kept,
        places=tokens.places[index],
    )


def _one_absent(tokens: PackedTokens) -> PackedTokens:
    place = tokens.places.new_zeros(1)
    zero = tokens.sampler.new_zeros(1)
    return replace(
        tokens,
        sampler=zero,
        learner=zero,
        d=zero,
        present=place.bool(),
        band=place.int(),
        kept=tokens.kept.index_fill(0, place, 1),
        places=place,
    )
