"""Sampled sequences with the sampler's log-probs, and their layout as batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampled:
    """One response, by the token.

    Attributes:
        prompt, response: token ids.
        log_probs: log μ of each token of the response, after temperature; as long as ``response``.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    log_probs: tuple[float, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


def batches(sequences: Sequence[Sampled], tokens: int) -> Iterator[list[int]]:
    """Yield positions of sequences in batches of at most ``tokens``, padding included; a longer sequence alone.

    They are sorted by length, so that there is little padding.
    """
    batch: list[int] = []
    for place in sorted(range(len(sequences)), key=lambda place: sequences[place].length):
        if batch and sequences[place].length * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def padded(sequences: Sequence[Sampled], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, attention mask and response mask, (sequences, longest), padded on the right with token 0."""
    longest = max(sequence.length for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    attended, sampled = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : sequence.length] = torch.tensor([*sequence.prompt, *sequence.response])
        attended[row, : sequence.length] = 1
        sampled[row, len(sequence.prompt) : sequence.length] = 1
    return ids.to(device), attended.to(device), sampled.to(device)


def aligned(sequences: Sequence[Sampled], values: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """log μ, other values of the same tokens, and their mask, each (sequences, longest response), float64."""
    longest = max(len(sequence.response) for sequence in sequences)
    sampler = torch.zeros(len(sequences), longest, dtype=torch.float64)
    others, mask = torch.zeros_like(sampler), torch.zeros_like(sampler, dtype=torch.bool)
    for row, (sequence, own) in enumerate(zip(sequences, values, strict=True)):
        size = len(sequence.response)
        sampler[row, :size] = torch.tensor(sequence.log_probs, dtype=torch.float64)
        others[row, :size] = torch.tensor(own, dtype=torch.float64)
        mask[row, :size] = True
    return sampler, others, mask
