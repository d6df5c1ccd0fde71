"""What a probe of a model of half a billion parameters costs: time, and memory beside its FP32 weights.

    python -m integration.bench.probe_cost                # 32 prompts × 256 tokens

The model has Qwen2.5-0.5B's shape and random weights; it is sampled by its own decoding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from fp16_patch.probe.examining import ProbeRequest, examine
from fp16_patch.probe.progress import on_terminal
from integration.cpu.tiny_model import character_tokenizer

BYTES = 4


def write_half_billion(out: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(out)
    character_tokenizer().save_pretrained(out)
    return out


def measure(count: int, tokens: int, seed: int, console: Console) -> dict[str, Any]:
    """Seconds, the process's largest memory, and that ÷ the FP32 weights."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_half_billion(Path(folder) / "model", seed)
        with on_terminal(console) as phases:
            request = ProbeRequest(model, sampler="hf", count=count, max_new_tokens=tokens, device="cpu", seed=seed)
            result = examine(request, phases)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    console = Console()
    measured = measure(arguments.count, arguments.tokens, arguments.seed, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "probe_cost.json").write_text(json.dumps(measured, indent=1) + "\n")
    console.print(measured)


if __name__ == "__main__":
    main()
