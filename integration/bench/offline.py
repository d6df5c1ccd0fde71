"""Measure the offline mismatch: real vLLM samples, verl's FSDP engine scores, for every pair of dtypes.

    python -m integration.bench.offline                # dense, LoRA of two sizes, mixture of experts
    python -m integration.bench.offline dense

Dense is the demo's checkpoint; the adapters on it are random, of the size that training gives them; the mixture of
experts is trained on the demo's task for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from integration.bench.command import Bench, parser, results_folder
from integration.bench.verl_learner import LearnerModel, scores
from integration.cpu.tiny_families import tiny_family
from integration.cpu.tiny_model import character_tokenizer
from integration.demo import make_model, task

PROMPT_SEED = 5
ADAPTER_STD = 0.02
# Gate → from what to what, over every kind of model.
GATES = {"fp16/fp16": (0.0, 1e-3), "fp32/fp32": (0.0, 1e-5), "bf16 ÷ fp16": (5.0, 12.0)}


@dataclass(frozen=True)
class Size:
    """What is put into models and samples.

    Attributes:
        problems: that are asked.
        responses: to each of them.
        expert_responses: of the mixture of experts. A token for which rounding sends a router to another expert is rare
            and its d is large: more of them to average over.
        model: what is put into the demo's model.
        expert_steps: of training of the mixture of experts.
    """

    problems: int = 32
    responses: int = 8
    expert_responses: int = 32
    model: make_model.Effort = make_model.FULL
    expert_steps: int = 200


FULL = Size()
SMOKE = Size(problems=2, responses=2, expert_responses=2, model=make_model.SMOKE, expert_steps=1)
SMOKE_KINDS = ("lora", "moe")


@dataclass(frozen=True)
class Subject:
    """A model on both sides: what vLLM loads, and what the learner does; responses to each problem."""

    sampled: Path
    learned: LearnerModel
    responses: int


def dense(out: Path, seed: int, size: Size) -> Subject:
    """The demo's model."""
    path = demo_checkpoint(out, seed, size.model)
    return Subject(path, LearnerModel(path), size.responses)


def lora_32(out: Path, seed: int, size: Size) -> Subject:
    """Large adapters on it."""
    return _lora(out, seed, size, rank=32, alpha=64)


def lora_1(out: Path, seed: int, size: Size) -> Subject:
    """The size in the paper's authors' own scripts."""
    return _lora(out, seed, size, rank=1, alpha=2)


def moe(out: Path, seed: int, size: Size) -> Subject:
    """A mixture of experts, trained for a while."""
    path = out / "moe"
    if not (path / "config.json").is_file():
        tokenizer, model = character_tokenizer(), tiny_family("qwen3_moe", seed)
        make_model.train(model, tokenizer, seed, steps=size.expert_steps)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return Subject(path, LearnerModel(path), size.expert_responses)


KINDS: dict[str, Callable[[Path, int, Size], Subject]] = {
    "dense": dense,
    "lora": lora_32,
    "lora_rank1": lora_1,
    "moe": moe,
}


def demo_checkpoint(out: Path, seed: int, effort: make_model.Effort = make_model.FULL) -> Path:
    """Make the demo's model if it is not there; returns its folder."""
    path = out / "dense"
    if not (path / "config.json").is_file():
        make_model.make(path, seed, effort)
    return path


def _lora(out: Path, seed: int, size: Size, rank: int, alpha: int) -> Subject:
    """Make adapters on the demo's model: beside the weights for the learner, merged in FP32 for the sampler."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter, merged = demo_checkpoint(out, seed, size.model), out / f"adapter_{rank}", out / f"merged_{rank}"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=ADAPTER_STD)
    adapted.save_pretrained(adapter)
    adapted.merge_and_unload().save_pretrained(merged)
    character_tokenizer().save_pretrained(merged)
    return Subject(merged, LearnerModel(base, adapter, rank, alpha), size.responses)


def prompts(problems: int, responses: int) -> list[task.Problem]:
    """List each problem as often as it is answered, next to each other."""
    return [problem for problem in task.problems(problems, PROMPT_SEED) for _ in range(responses)]


def sample(path: Path, dtype: str, seed: int, asked: Sequence[task.Problem]) -> list[Sampled]:
    """Sample one response to each of these from vLLM, at temperature 1."""
    tokenizer = character_tokenizer()
    ids = [tokenizer(problem.prompt)["input_ids"] for problem in asked]
    stop = frozenset([tokenizer.eos_token_id])
    sampling = Sampling(max_new_tokens=make_model.MAX_RESPONSE, stop=stop, seed=seed)
    return vllm_sampler.sample(path, ids, dtype, sampling, watch=False)[0]


def measure(kind: str, out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Measure each `learner/sampler`, and the ratio of bf16 to fp16; see `fp16_patch.probe.comparing`."""
    subject = KINDS[kind](out / "models", seed, size)
    asked = prompts(size.problems, subject.responses)
    sampled = {dtype: sample(subject.sampled, dtype, seed, asked) for dtype in DTYPES}
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
    """Gate → whether the figure lies in its bounds."""
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


BENCHES = {
    kind: Bench(f"offline_{kind}", partial(measure, kind), partial(show, kind), FULL, SMOKE, folder="evidence")
    for kind in KINDS
}


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="only these")
    arguments = made.parse_args(argv)
    with results_folder(arguments.out, smoke=arguments.smoke) as out:
        for kind in arguments.kinds or (SMOKE_KINDS if arguments.smoke else KINDS):
            BENCHES[kind].run(out, arguments.seed, SMOKE if arguments.smoke else FULL)


if __name__ == "__main__":
    main()
