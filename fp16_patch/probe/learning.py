"""The learner's side: log-probs of sampled tokens, and the policy's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fp16_patch.probe.precision import computing_in
from fp16_patch.probe.sequences import Sampled, batches, padded

Advance = Callable[[int], None]


def token_log_probs(model: nn.Module, ids: Tensor, attended: Tensor, temperature: float) -> Tensor:
    """log π of each token but the first, (sequences, tokens − 1), in FP32 as frameworks compute it."""
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1]
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def score(
    model: nn.Module,
    sequences: Sequence[Sampled],
    dtype: torch.dtype,
    *,
    device: str,
    temperature: float,
    batch_tokens: int,
    advance: Advance,
) -> list[list[float]]:
    """log π of every response's tokens by a model whose parameters are in ``dtype``.

    Args:
        batch_tokens: tokens a forward holds, padding included.
        advance: called with the number of sequences that are done.
    """
    scores: list[list[float]] = [[] for _ in sequences]
    with computing_in(dtype, device):
        for places in batches(sequences, batch_tokens):
            ids, attended, sampled = padded([sequences[place] for place in places], device)
            log_probs = token_log_probs(model, ids, attended, temperature)
            for row, place in enumerate(places):
                scores[place] = log_probs[row][sampled[row, 1:].bool()].tolist()
            advance(len(places))
    return scores


def policy_gradient(
    model: nn.Module,
    sequences: Sequence[Sampled],
    *,
    device: str,
    temperature: float,
    batch_tokens: int,
    advance: Advance,
) -> None:
    """Run backward of −mean_t A·log π for every batch as if it were the update's only one, A = ±1 in turn, in FP32.

    An update of several micro-batches divides by the tokens of all, so that its gradients are smaller. Where the
    gradients go is for hooks to see, on a model whose parameters require them.
    """
    done = 0
    for places in batches(sequences, batch_tokens):
        ids, attended, sampled = padded([sequences[place] for place in places], device)
        signs = torch.tensor([1.0 if (done + row) % 2 == 0 else -1.0 for row in range(len(places))], device=device)
        with torch.enable_grad():
            log_probs = token_log_probs(model, ids, attended, temperature)
            mask = sampled[:, 1:]
            loss = -(log_probs * mask * signs[:, None]).sum() / mask.sum()
            loss.backward()
        done += len(places)
        advance(len(places))
