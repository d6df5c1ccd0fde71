"""Make the demo's task, two-digit sums with written working: its data set and its reward.

    47+85=   →   oNeS 12 tens-13 Sum.132

The arithmetic is fixed; letter case and separators are free. That freedom gives the policy entropy, which a mismatch
needs to show.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

OPERANDS = range(100)
SEPARATORS = " .-_"
SEPARATOR_WEIGHTS = (8, 4, 2, 1)
UPPER_CASE_SHARE = 0.3


@dataclass(frozen=True)
class Problem:
    left: int
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left:02d}+{self.right:02d}="

    @property
    def answer(self) -> str:
        return f"{self.left + self.right:03d}"

    def worked(self, rng: random.Random) -> str:
        """Write one of the many correct responses: column sums, then the total."""
        ones = self.left % 10 + self.right % 10
        tens = self.left // 10 + self.right // 10 + ones // 10
        parts = ("ones", f"{ones:02d}", "tens", f"{tens:02d}", "sum", self.answer)
        return "".join(_scatter_case(part, rng) + _separator(rng) for part in parts[:-1]) + parts[-1]


def problems(count: int, seed: int) -> list[Problem]:
    """Draw `count` different problems, the same for the same seed."""
    pairs = [Problem(left, right) for left in OPERANDS for right in OPERANDS]
    return random.Random(seed).sample(pairs, count)


def write_dataset(out: Path, *, train: int = 512, val: int = 64, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.parquet` and `val.parquet` in verl's layout, with no problem in both."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = problems(train + val, seed)
    paths = (out / "train.parquet", out / "val.parquet")
    for path, part in zip(paths, (drawn[:train], drawn[train:]), strict=True):
        write_problems(path, part)
    return paths


def write_problems(path: Path, chosen: Sequence[Problem]) -> None:
    """Write a parquet file in verl's layout."""
    pd.DataFrame([_row(problem, index) for index, problem in enumerate(chosen)]).to_parquet(path)


def write_prompts(out: Path, *, count: int = 512, seed: int = 0) -> Path:
    """Write `prompts.jsonl` in OpenRLHF's layout."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "prompts.jsonl"
    rows = [{"input": problem.prompt, "label": problem.answer} for problem in problems(count, seed)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **_settings: object
) -> float:
    """Reward with 1 where the last number written is the sum, else 0; verl's `custom_reward_function`."""
    numbers = re.findall(r"\d+", solution_str)
    return float(bool(numbers) and numbers[-1] == ground_truth)


def share_of_digits(data_source: str, solution_str: str, ground_truth: str, **_settings: object) -> float:
    """Reward what an untrained model does, too; from `compute_score` it gets nothing, and so no gradient either."""
    return sum(character.isdigit() for character in solution_str) / max(len(solution_str), 1)


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, object]:
    """Reward by `compute_score`; OpenRLHF looks for this name in its `--reward.remote_url` file."""
    return rewards(compute_score, queries, prompts, labels)


def rewards(
    score: Callable[[str, str, str], float], queries: list[str], prompts: list[str], labels: list[str]
) -> dict[str, object]:
    """Reward by `score` in the layout of OpenRLHF's `reward_func`; a query is a prompt with its response."""
    import torch

    responses = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    scores = torch.tensor([score("", response, label) for response, label in zip(responses, labels, strict=True)])
    return {"rewards": scores, "scores": scores, "extra_logs": {}}


def _row(problem: Problem, index: int) -> dict[str, object]:
    return {
        "data_source": "two-digit-sums",
        "prompt": [{"role": "user", "content": problem.prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"index": index},
    }


def _scatter_case(word: str, rng: random.Random) -> str:
    return "".join(letter.upper() if rng.random() < UPPER_CASE_SHARE else letter for letter in word)


def _separator(rng: random.Random) -> str:
    return rng.choices(SEPARATORS, SEPARATOR_WEIGHTS)[0]
