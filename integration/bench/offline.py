"""The offline mismatch: real vLLM samples, verl's FSDP engine scores, for every pair of dtypes.

    python -m integration.bench.offline                # dense, LoRA of two sizes, mixture of experts
    python -m integration.bench.offline dense

Dense is the demo's checkpoint; the adapters on it are random, of the size that training gives them; the mixture of
experts is trained on the demo's task for a while.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fp16_patch.probe import vllm_sampler
from fp16_patch.probe.comparing import Pair, ratio
from fp16_patch.probe.precision import DTYPES
from fp16_patch.probe.sampling import Sampling
from fp16_patch.probe.sequences import Sampled
from integration.bench.verl_learner import LearnerModel, scores
from integration.cpu.tiny_families import tiny_family
from integration.cpu.tiny_model import character_tokenizer
from integration.demo import make_model, task

PROBLEMS, RESPONSES, MAX_RESPONSE = 32, 8, make_model.MAX_RESPONSE
# A token for which rounding sends a router to another expert is rare and its d is large: more of them to average over.
EXPERT_RESPONSES = 32
PROMPT_SEED = 5
ADAPTER_STD = 0.02
EXPERT_STEPS = 200
# Gate → from what to what, over every kind of model.
GATES = {"fp16/fp16": (0.0, 1e-3), "fp32/fp32": (0.0, 1e-5), "bf16 ÷ fp16": (5.0, 12.0)}


@dataclass(frozen=True)
class Subject:
    """A model on both sides: what vLLM loads, and what the learner does."""

    sampled: Path
    learned: LearnerModel
    responses: int = RESPONSES


def dense(out: Path, seed: int) -> Subject:
    path = demo_checkpoint(out, seed)
    return Subject(path, LearnerModel(path))


def lora_32(out: Path, seed: int) -> Subject:
    return _lora(out, seed, rank=32, alpha=64)


def lora_1(out: Path, seed: int) -> Subject:
    """The size in the paper's authors' own scripts."""
    return _lora(out, seed, rank=1, alpha=2)


def moe(out: Path, seed: int) -> Subject:
    path = out / "moe"
    if not (path / "config.json").is_file():
        tokenizer, model = character_tokenizer(), tiny_family("qwen3_moe", seed)
        make_model.train(model, tokenizer, seed, steps=EXPERT_STEPS)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return Subject(path, LearnerModel(path), EXPERT_RESPONSES)


KINDS: dict[str, Callable[[Path, int], Subject]] = {"dense": dense, "lora": lora_32, "lora_rank1": lora_1, "moe": moe}


def demo_checkpoint(out: Path, seed: int) -> Path:
    """The demo's model, made if it is not there."""
    path = out / "dense"
    if not (path / "config.json").is_file():
        make_model.main.callback(out=path, seed=seed)  # type: ignore[misc]
    return path


def _lora(out: Path, seed: int, rank: int, alpha: int) -> Subject:
    """Adapters on the demo's checkpoint: beside the weights for the learner, merged in FP32 for the sampler."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter, merged = demo_checkpoint(out, seed), out / f"adapter_{rank}", out / f"merged_{rank}"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=ADAPTER_STD)
    adapted.save_pretrained(adapter)
    adapted.merge_and_unload().save_pretrained(merged)
    character_tokenizer().save_pretrained(merged)
    return Subject(merged, LearnerModel(base, adapter, rank, alpha))


def prompts(responses: int = RESPONSES) -> list[task.Problem]:
    """Each problem as often as it is answered, next to each other."""
    return [problem for problem in task.problems(PROBLEMS, PROMPT_SEED) for _ in range(responses)]


def sample(path: Path, dtype: str, seed: int, responses: int = RESPONSES) -> list[Sampled]:
    tokenizer = character_tokenizer()
    asked = [tokenizer(problem.prompt)["input_ids"] for problem in prompts(responses)]
    stop = frozenset([tokenizer.eos_token_id])
    sampling = Sampling(max_new_tokens=MAX_RESPONSE, stop=stop, seed=seed)
    return vllm_sampler.sample(path, asked, dtype, sampling, watch=False)[0]


def measure(kind: str, out: Path, seed: int) -> dict[str, Any]:
    """`learner/sampler` → figures, and the ratio of bf16 to fp16; see `fp16_patch.probe.comparing`."""
    subject = KINDS[kind](out / "models", seed)
    sampled = {dtype: sample(subject.sampled, dtype, seed, subject.responses) for dtype in DTYPES}
    pairs: dict[str, Pair] = {}
    for learner in DTYPES:
        # One start of the engine scores what all samplers drew.
        everything = [sequence for sequences in sampled.values() for sequence in sequences]
        values = iter(scores(subject.learned, everything, learner))
        for sampler, sequences in sampled.items():
            pairs[f"{learner}/{sampler}"] = Pair.of(sequences, [next(values) for _ in sequences])
    figures = {name: pair.figures(seed) for name, pair in pairs.items()}
    gain = ratio(pairs["bf16/bf16"], pairs["fp16/fp16"], seed)
    return {**figures, "bf16 ÷ fp16": gain, "gates": gates(figures, gain)}


def gates(figures: dict[str, Any], gain: dict[str, Any]) -> dict[str, bool]:
    values = {name: figures[name]["mean_abs"] for name in ("fp16/fp16", "fp32/fp32")} | {"bf16 ÷ fp16": gain["ratio"]}
    return {name: low <= values[name] <= high for name, (low, high) in GATES.items()}


def show(kind: str, measured: dict[str, Any], console: Console) -> None:
    table = Table("learner/sampler", "mean |d|", "mean |Σd|", "k3", "max |d|", title=kind, title_justify="left")
    for name, figures in measured.items():
        if "/" in name:
            cells = (figures[metric] for metric in ("mean_abs", "seq_mean_abs", "k3", "max_abs"))
            table.add_row(name, *(f"{value:.2e}" for value in cells))
    console.print(table)
    low, high = measured["bf16 ÷ fp16"]["interval"]
    console.print(f"bf16 ÷ fp16: {measured['bf16 ÷ fp16']['ratio']:.2f} [{low:.2f} … {high:.2f}]; {measured['gates']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve() / "offline"
    for kind in arguments.kinds or KINDS:
        measured = measure(kind, out, arguments.seed)
        (out / f"{kind}.json").write_text(json.dumps(measured, indent=1) + "\n")
        show(kind, measured, Console())


if __name__ == "__main__":
    main()
