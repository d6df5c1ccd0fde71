"""Measure what a probe of a model of half a billion parameters costs: time, and memory beside its FP32 weights.

    python -m integration.bench.probe_cost                # 32 prompts × 256 tokens

The model has Qwen2.5-0.5B's shape and random weights; it is sampled by its own decoding.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from fp16_patch.probe.examining import ProbeRequest, examine
from fp16_patch.probe.progress import on_terminal
from integration.bench.command import Bench, parser, results_folder
from integration.cpu.tiny_model import character_tokenizer

BYTES = 4


HALF_BILLION = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Size:
    """Shape of the model, prompts of the probe, and tokens of a response."""

    shape: Mapping[str, int] = field(default_factory=lambda: HALF_BILLION)
    count: int = 32
    tokens: int = 256


TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SMOKE = Size(TINY, count=1, tokens=2)


def write_model(out: Path, seed: int, shape: Mapping[str, int]) -> Path:
    """Write a model of this shape and random weights, with a tokenizer."""
    torch.manual_seed(seed)
    config = Qwen2Config(**shape, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None)
    Qwen2ForCausalLM(config).save_pretrained(out)
    character_tokenizer().save_pretrained(out)
    return out


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Measure seconds, the process's largest memory in bytes, and that ÷ the FP32 weights."""
    model = write_model(out / "model", seed, size.shape)
    with on_terminal(Console()) as phases:
        limits = {"count": size.count, "max_new_tokens": size.tokens}
        result = examine(ProbeRequest(model, sampler="hf", device="cpu", seed=seed, **limits), phases)
    shutil.rmtree(model)
    weights = BYTES * result.model["parameters"]
    return {
        **result.cost,
        "memory_ratio": result.cost["memory_bytes"] / weights,
        "parameters": result.model["parameters"],
        "tokens": sum(figures["tokens"] for name, figures in result.mismatch.items() if name.startswith("fp32/")),
        "threads": torch.get_num_threads(),
        "recommendation": result.recommendation.precision,
    }


def show(measured: dict[str, Any], console: Console) -> None:
    console.print(measured)


BENCH = Bench("probe_cost", measure, show, full=Size(), smoke=SMOKE)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--count", type=int, default=Size.count, help="prompts; default: %(default)s")
    made.add_argument("--tokens", type=int, default=Size.tokens, help="of a response; default: %(default)s")
    arguments = made.parse_args(argv)
    asked = replace(BENCH.full, count=arguments.count, tokens=arguments.tokens)
    with results_folder(arguments.out, smoke=arguments.smoke) as out:
        BENCH.run(out, arguments.seed, BENCH.smoke if arguments.smoke else asked)


if __name__ == "__main__":
    main()
