"""Problems that a model solves sometimes: of the paper's sanity test, where what is left to learn is within reach."""

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

DRAWN, SAMPLES = 128, 16
LOW, HIGH = 0.2, 0.8
# Neither the demo's problems nor those on which the model was measured while it was made.
PROBLEM_SEED = 11


@dataclass(frozen=True)
class ProblemSet:
    """Files in verl's layout, and what the model makes of the problems before training; both files have the same."""

    train: Path
    val: Path
    facts: dict[str, Any]


def prepare(model: Path, out: Path, drawn: int = DRAWN, samples: int = SAMPLES) -> ProblemSet:
    """The problems in ``out``, chosen there unless they were before; the same for every seed of a training."""
    paths = out / "train.parquet", out / "val.parquet"
    kept, asked = out / "solve_rates.json", {"drawn": drawn, "samples": samples, "low": LOW, "high": HIGH}
    facts = json.loads(kept.read_text()) if kept.is_file() else {}
    if {name: facts.get(name) for name in asked} != asked:
        out.mkdir(parents=True, exist_ok=True)
        candidates = problems(drawn, PROBLEM_SEED)
        rates = solve_rates(model, candidates, samples)
        chosen = select(candidates, rates)
        for path in paths:
            task.write_problems(path, [problem for problem, _ in chosen])
        facts = asked | facts_of(rates, chosen)
        kept.write_text(json.dumps(facts, indent=1) + "\n")
    return ProblemSet(*paths, facts)


def select(candidates: Sequence[Problem], rates: Sequence[float]) -> list[tuple[Problem, float]]:
    """Those whose rate is from ``LOW`` to ``HIGH``, both included."""
    return [pair for pair in zip(candidates, rates, strict=True) if LOW <= pair[1] <= HIGH]


def facts_of(rates: Sequence[float], chosen: Sequence[tuple[Problem, float]]) -> dict[str, Any]:
    kept = [rate for _, rate in chosen]
    return {
        "kept": len(kept),
        "solve_rate_of_all": statistics.fmean(rates),
        "solve_rate_of_kept": statistics.fmean(kept) if kept else None,
        "problems": [asdict(problem) | {"solve_rate": rate} for problem, rate in chosen],
    }


@torch.no_grad()
def solve_rates(model_path: Path, asked: Sequence[Problem], samples: int, seed: int = 0) -> list[float]:
    """Of each problem the share of ``samples`` responses at temperature 1, in FP32, that are right."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), character_tokenizer()
    prompts = tokenizer([problem.prompt for problem in asked])["input_ids"]
    repeated = [ids for ids in prompts for _ in range(samples)]
    sampling = Sampling(max_new_tokens=make_model.MAX_RESPONSE, stop=frozenset([tokenizer.eos_token_id]), seed=seed)
    sampled = decode(model, repeated, torch.float32, sampling, device="cpu", advance=lambda _done: None)
    texts = iter(tokenizer.batch_decode([one.response for one in sampled], skip_special_tokens=True))
    return [
        statistics.fmean(compute_score("", next(texts), problem.answer) for _ in range(samples)) for problem in asked
    ]
