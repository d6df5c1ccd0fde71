"""Measure what mismatch and rounding do to the policy's gradient, beside the noise of sampling.

    python -m integration.bench.gradient

The gradient is that of −mean_t A·log π on the demo's checkpoint, A = reward − mean of the problem's responses; shares
are of its norm in FP32:

- precision error: ‖g(dtype) − g(fp32)‖, on the same responses;
- effect of importance sampling: ‖g with each sequence weighed by exp(Σd) − g‖, d = log π_learner − log μ_sampler of the
  dtype's own sampler and learner: what leaving the mismatch alone costs;
- sampling noise: the mean of ‖g of a batch − g of all‖ over batches of eight problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fp16_patch.probe.learning import token_log_probs
from fp16_patch.probe.precision import DTYPES, HALF, ProductsInFloat32, in_dtype
from fp16_patch.probe.sequences import Sampled, batches, padded
from integration.bench import offline
from integration.bench.command import Bench
from integration.cpu.tiny_model import character_tokenizer
from integration.demo.task import Problem, compute_score

BATCH_TOKENS = 2048
LOSS_SCALE = 1024.0
"""For FP16 alone: a power of two, so that it changes no bit of what neither over- nor underflows."""


@dataclass(frozen=True)
class Size:
    """What is sampled, and the problems of a batch."""

    sampled: offline.Size = offline.FULL
    batch: int = 8


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """dtype → its shares; responses are sampled by vLLM in that dtype."""
    path = offline.demo_checkpoint(out / "models", seed, size.sampled.model)
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    asked = offline.prompts(size.sampled.problems, size.sampled.responses)
    return {
        dtype: shares(exact, offline.sample(path, dtype, seed, asked), asked, dtype, size)
        for dtype in ("fp32", "fp16", "bf16")
    }


def shares(
    exact: nn.Module, sequences: Sequence[Sampled], asked: Sequence[Problem], dtype: str, size: Size
) -> dict[str, float]:
    """Measure the shares of one dtype, from responses that were sampled in it to these problems."""
    scored, responses = rewards(sequences, asked), size.sampled.responses
    advantages = group_advantages(scored, responses)
    model = in_dtype(exact, DTYPES[dtype])
    weights = importance_weights(model, sequences, dtype)
    reference = gradient(exact, sequences, advantages, "fp32")
    norm = reference.norm()
    rows = size.batch * responses
    parts = [slice(start, start + rows) for start in range(0, len(sequences), rows)]
    of_batches = [gradient(exact, sequences[part], advantages[part], "fp32") for part in parts]
    whole = torch.stack(of_batches).mean(0)
    return {
        "precision_error": float((gradient(model, sequences, advantages, dtype) - reference).norm() / norm),
        "importance_effect": float(
            (gradient(exact, sequences, advantages * weights, "fp32") - reference).norm() / norm
        ),
        "sampling_noise": float(torch.stack([(part - whole).norm() for part in of_batches]).mean() / whole.norm()),
        "gradient_norm": float(norm),
        "sequences": len(sequences),
        "mean_reward": float(scored.mean()),
    }


def rewards(sequences: Sequence[Sampled], asked: Sequence[Problem]) -> Tensor:
    """Score each response, (sequences,), float64."""
    tokenizer = character_tokenizer()
    texts = [tokenizer.decode(sequence.response, skip_special_tokens=True) for sequence in sequences]
    scored = [compute_score("", text, problem.answer) for text, problem in zip(texts, asked, strict=True)]
    return torch.tensor(scored, dtype=torch.float64)


def group_advantages(scored: Tensor, responses: int) -> Tensor:
    """Return reward − mean over the problem's responses, (sequences,)."""
    grouped = scored.view(-1, responses)
    return (grouped - grouped.mean(1, keepdim=True)).flatten()


def importance_weights(model: nn.Module, sequences: Sequence[Sampled], dtype: str) -> Tensor:
    """Return exp(Σ_t d) of each sequence, (sequences,), float64."""
    weights = torch.zeros(len(sequences), dtype=torch.float64)
    with torch.no_grad():
        for places, log_probs, mask in _scored(model, sequences, dtype):
            for row, place in enumerate(places):
                learner = log_probs[row][mask[row]].double()
                weights[place] = (learner - torch.tensor(sequences[place].log_probs, dtype=torch.float64)).sum().exp()
    return weights


def gradient(model: nn.Module, sequences: Sequence[Sampled], advantages: Tensor, dtype: str) -> Tensor:
    """Differentiate −Σ A·log π ÷ tokens by every parameter, one after the other; float64, as batches are added up."""
    tokens = sum(len(sequence.response) for sequence in sequences)
    scale = LOSS_SCALE if dtype == "fp16" else 1.0
    model.requires_grad_(True)
    total: Tensor | None = None
    for places, log_probs, mask in _scored(model, sequences, dtype):
        loss = -(log_probs * mask * advantages[places].float()[:, None]).sum() / tokens
        model.zero_grad(set_to_none=True)
        (loss * scale).backward()
        flat = torch.cat([parameter.grad.double().flatten() / scale for parameter in model.parameters()])
        total = flat if total is None else total + flat
    model.requires_grad_(False)
    assert total is not None
    return total


def _scored(model: nn.Module, sequences: Sequence[Sampled], dtype: str) -> Any:
    """Yield (places, log π of each token but the first, which of them are sampled), batch by batch."""
    with ExitStack() as stack:
        if DTYPES[dtype] in HALF:
            stack.enter_context(torch.autocast("cpu", DTYPES[dtype]))
            # Backward runs in this block, too: its products are formed the same way.
            stack.enter_context(ProductsInFloat32())
        for places in batches(sequences, BATCH_TOKENS):
            ids, attended, sampled = padded([sequences[place] for place in places], "cpu")
            yield places, token_log_probs(model, ids, attended, 1.0), sampled[:, 1:].bool()


def show(measured: dict[str, dict[str, float]], console: Console) -> None:
    names = ("precision_error", "importance_effect", "sampling_noise")
    table = Table("dtype", *(name.replace("_", " ") for name in names), title="shares of the gradient's norm")
    for dtype in DTYPES:
        found = measured[dtype]
        table.add_row(dtype, *(f"{found[name]:.2%}" for name in names))
    console.print(table)


SMOKE = Size(offline.SMOKE, batch=1)
BENCH = Bench("gradient", measure, show, full=Size(), smoke=SMOKE, folder="evidence")

if __name__ == "__main__":
    BENCH.main(__doc__)
