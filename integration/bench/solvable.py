"""Choose problems that a model solves sometimes, as the paper's sanity test does: what is left to learn is in reach."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fp16_patch.probe.sampling import Sampling, decode
from integration.cpu.tiny_model import character_tokenizer
from integration.demo import make_model, task
from integration.demo.task import Problem, compute_score, problems

LOW, HIGH = 0.2, 0.8
# Neither the demo's problems nor those on which the model was measured while it was made.
PROBLEM_SEED = 11


@dataclass(frozen=True)
class Draw:
    """How many problems are drawn, how often each is tried, and from which to which solve rate they are kept."""

    drawn: int = 128
    samples: int = 16
    low: float = LOW
    high: float = HIGH


DRAW = Draw()
# Whatever the model makes of them.
SMOKE = Draw(drawn=8, samples=1, low=0.0, high=1.0)


@dataclass(frozen=True)
class ProblemSet:
    """Files of the same problems in verl's layout, and what the model makes of them before training."""

    train: Path
    val: Path
    facts: dict[str, Any]


def prepare(model: Path, out: Path, draw: Draw = DRAW) -> ProblemSet:
    """Choose the problems in `out`, unless they were before; the same for every seed of a training."""
    paths = out / "train.parquet", out / "val.parquet"
    kept, asked = out / "solve_rates.json", asdict(draw)
    facts = json.loads(kept.read_text()) if kept.is_file() else {}
    if {name: facts.get(name) for name in asked} != asked:
        out.mkdir(parents=True, exist_ok=True)
        candidates = problems(draw.drawn, PROBLEM_SEED)
        rates = solve_rates(model, candidates, draw.samples)
        chosen = select(candidates, rates, draw)
        for path in paths:
            task.write_problems(path, [problem for problem, _ in chosen])
        facts = asked | facts_of(rates, chosen)
        kept.write_text(json.dumps(facts, indent=1) + "\n")
    return ProblemSet(*paths, facts)


def select(candidates: Sequence[Problem], rates: Sequence[float], draw: Draw = DRAW) -> list[tuple[Problem, float]]:
    """Keep those whose rate is from `low` to `high`, both included."""
    return [pair for pair in zip(candidates, rates, strict=True) if draw.low <= pair[1] <= draw.high]


def facts_of(rates: Sequence[float], chosen: Sequence[tuple[Problem, float]]) -> dict[str, Any]:
    """Describe the chosen problems, and how well all were solved."""
    kept = [rate for _, rate in chosen]
    return {
        "kept": len(kept),
        "solve_rate_of_all": statistics.fmean(rates),
        "solve_rate_of_kept": statistics.fmean(kept) if kept else None,
        "problems": [asdict(problem) | {"solve_rate": rate} for problem, rate in chosen],
    }


@torch.no_grad()
def solve_rates(model_path: Path, asked: Sequence[Problem], samples: int, seed: int = 0) -> list[float]:
    """Measure the share of `samples` responses to each problem, at temperature 1 in FP32, that are right."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), character_tokenizer()
    prompts = tokenizer([problem.prompt for problem in asked])["input_ids"]
    repeated = [ids for ids in prompts for _ in range(samples)]
    sampling = Sampling(max_new_tokens=make_model.MAX_RESPONSE, stop=frozenset([tokenizer.eos_token_id]), seed=seed)
    sampled = decode(model, repeated, torch.float32, sampling, device="cpu", advance=lambda _done: None)
    texts = iter(tokenizer.batch_decode([one.response for one in sampled], skip_special_tokens=True))
    return [
        statistics.fmean(compute_score("", next(texts), problem.answer) for _ in range(samples)) for problem in asked
    ]
