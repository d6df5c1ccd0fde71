"""A simulated policy as two sides see it, with what may be wrong between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp16_patch.mismatch.diagnosis.findings import Diagnosis
from fp16_patch.mismatch.statistics.summary import MismatchStats

BF16, FP16 = 2.0**-9, 2.0**-12

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Policy:
    """A softmax policy as two sides see it. Contexts differ in how peaked their distribution is.

    Attributes:
        noise: standard deviation of each side's error of a logit, as a share of the context's largest one.
        peaks: range of the standard deviations of a context's logits.
        draws: tokens sampled from each context.
        reported: temperature of the sampler's log-probs, if it is not the one it samples at.
        behind: by step, how many updates the sampler is behind; the last entry holds from there on.
        edge: what is wrong with the mask, a key of EDGES.
    """

    noise: float = BF16
    vocabulary: int = 64
    peaks: tuple[float, float] = (0.6, 7.0)
    draws: int = 1
    sampler_temperature: float = 1.0
    learner_temperature: float = 1.0
    reported: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    behind: tuple[int, ...] = (0,)
    edge: str = ""

    def run(self, tokens: int, seed: int, steps: int = 4, first: int = 1) -> dict[int, MismatchStats]:
        generator = torch.Generator().manual_seed(seed)
        batches = (self.batch(tokens // steps, index, generator) for index in range(steps))
        return {first + index: MismatchStats.from_log_probs(*batch) for index, batch in enumerate(batches)}

    def batch(self, tokens: int, index: int, generator: torch.Generator) -> Batch:
        """One step's sequences of 5 to 32 tokens, each sampled from the sampler's distribution."""
        lengths = torch.randint(5, 33, (max(1, tokens // 18), 1), generator=generator)
        mask = torch.arange(33) < lengths
        sampler, learner = torch.zeros(mask.shape), torch.zeros(mask.shape)
        sampler[mask], learner[mask] = self._log_probs(int(mask.sum()), index, generator)
        return EDGES[self.edge](sampler, learner, mask, lengths) if self.edge else (sampler, learner, mask)

    def _log_probs(self, count: int, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """log μ and log π of ``count`` tokens."""

        def normal() -> Tensor:
            return torch.randn(-(-count // self.draws), self.vocabulary, generator=generator)

        low, high = map(math.log, self.peaks)
        scale = torch.exp(low + (high - low) * torch.rand(-(-count // self.draws), 1, generator=generator))
        logits = scale * normal()
        error = self.noise * logits.abs().amax(-1, keepdim=True)
        sampler = logits + error * normal()
        updates = self.behind[min(index, len(self.behind) - 1)]
        learner = logits * (1 + 0.005 * updates) + 0.03 * updates * scale.clamp(max=3) * normal() + error * normal()
        sampled = self._kept((sampler / self.sampler_temperature).log_softmax(-1))
        reported = sampled if self.reported is None else (sampler / self.reported).log_softmax(-1)
        tokens = torch.multinomial(sampled.exp(), self.draws, replacement=True, generator=generator)
        sides = reported, (learner / self.learner_temperature).log_softmax(-1)
        return tuple(side.gather(1, tokens).flatten()[:count] for side in sides)

    def _kept(self, log_probs: Tensor) -> Tensor:
        """What top-k and top-p keep, normalized again."""
        ordered, order = log_probs.sort(-1, descending=True)
        dropped = ordered.exp().cumsum(-1) - ordered.exp() >= self.top_p
        if self.top_k:
            dropped[:, self.top_k :] = True
        dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)
        return log_probs.masked_fill(dropped, -math.inf).log_softmax(-1)


def past_the_end(sampler: Tensor, learner: Tensor, mask: Tensor, lengths: Tensor) -> Batch:
    """The mask has moved by one: it misses the first token and covers padding, which the learner scores."""
    learner = learner.scatter(1, lengths, -3.0 - torch.arange(len(lengths)).unsqueeze(1) % 7)
    return sampler, learner, torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], 1)


def before_the_first(sampler: Tensor, learner: Tensor, mask: Tensor, lengths: Tensor) -> Batch:
    """The mask has moved the other way: it covers the prompt's last token, where the sampler has a pad value of −1."""
    prompt = -3.0 - torch.arange(len(lengths)).unsqueeze(1) % 7
    sampler, learner = torch.cat([prompt * 0 - 1, sampler], 1), torch.cat([prompt, learner], 1)
    return sampler, learner, torch.cat([mask, torch.zeros_like(mask[:, :1])], 1)


def log_probs_late(sampler: Tensor, learner: Tensor, mask: Tensor, lengths: Tensor) -> Batch:
    """The sampler's log-probs are those of the token before."""
    return torch.cat([torch.zeros_like(sampler[:, :1]), sampler[:, :-1]], 1), learner, mask


EDGES = {"past the end": past_the_end, "before the first": before_the_first, "log-probs late": log_probs_late}


def causes(findings: list[Diagnosis]) -> list[str]:
    return [finding.cause for finding in findings]


def text(findings: list[Diagnosis], cause: str) -> str:
    (finding,) = (finding for finding in findings if finding.cause == cause)
    return " ".join(finding.evidence)
