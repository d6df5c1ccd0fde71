"""The sampler's side: vLLM where it is installed, else the model's own decoding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp16_patch.probe.precision import computing_in
from fp16_patch.probe.sequences import Sampled

VLLM, HF = "vLLM", "transformers"


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: from the whole distribution, as RL does.

    Attributes:
        temperature: logits are divided by it.
        max_new_tokens: the longest response.
        stop: ids that end a response; the one that did is its last token.
        seed: same seed, same model, same dtype: same responses.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    stop: frozenset[int] = frozenset()
    seed: int = 0


def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    dtype: torch.dtype,
    sampling: Sampling,
    *,
    device: str,
    advance: Callable[[int], None],
    watched: AbstractContextManager[Any] | None = None,
) -> list[Sampled]:
    """Sample one response a prompt, all at once, token by token with a KV cache.

    Args:
        model: its parameters are in ``dtype``.
        advance: called with 1 for each position that is done.
        watched: entered for the time of sampling.
    """
    generator = torch.Generator(device).manual_seed(sampling.seed)
    ids, attended = _padded_on_the_left(prompts, device)
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    cache: Any = None
    with watched or nullcontext(), computing_in(dtype, device):
        for _ in range(sampling.max_new_tokens):
            logits, cache = _last_logits(model, ids, attended, cache)
            policy = (logits.float() / sampling.temperature).log_softmax(-1)
            # A NaN is for the figures to show, not for the draw to stumble over.
            drawable = policy.nan_to_num(nan=-1e4, neginf=-1e4).exp()
            ids = torch.multinomial(drawable, 1, generator=generator)
            tokens.append(ids.squeeze(-1).masked_fill(~going, -1))
            log_probs.append(policy.gather(-1, ids).squeeze(-1))
            attended = torch.cat([attended, going[:, None].long()], dim=1)
            going = going & ~_is_in(ids.squeeze(-1), sampling.stop)
            advance(1)
            if not going.any():
                break
    return _collected(prompts, torch.stack(tokens, 1).tolist(), torch.stack(log_probs, 1).tolist())


def _last_logits(model: nn.Module, ids: Tensor, attended: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return logits after the last of the new ids, (sequences, vocabulary), and the cache with them."""
    positions = (attended.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    given = {"position_ids": positions, "logits_to_keep": 1}
    known = inspect.signature(model.forward).parameters
    given = {name: value for name, value in given.items() if name in known}
    output = model(input_ids=ids, attention_mask=attended, past_key_values=cache, use_cache=True, **given)
    return output.logits[:, -1], output.past_key_values


def _padded_on_the_left(prompts: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attended = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attended[row, longest - len(prompt) :] = 1
    return ids.to(device), attended.to(device)


def _is_in(ids: Tensor, stop: frozenset[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(stop), dtype=ids.dtype, device=ids.device))


def _collected(
    prompts: Sequence[Sequence[int]], tokens: list[list[int]], log_probs: list[list[float]]
) -> list[Sampled]:
    sampled = []
    for prompt, row, values in zip(prompts, tokens, log_probs, strict=True):
        size = next((place for place, token in enumerate(row) if token < 0), len(row))
        sampled.append(Sampled(tuple(prompt), tuple(row[:size]), tuple(values[:size])))
    return sampled
