"""Demonstrate on synthetic precisions what a mismatch does to training while the precision stays the same.

    python -m integration.bench.synthetic                       # every arm on three seeds
    python -m integration.bench.synthetic --seeds 0 --bits 2    # one seed, another precision

A small model learns the demo's task by plain policy gradient. In three arms the sampler's matrix products have operands
of a few mantissa bits, always the same; the learner's have the same rounding, an equally coarse but different one, or
none. No real hardware computes so, and the mismatch is far larger than that of BF16: it is the mechanism that is shown.
All arms share model, problems, seeds and hyper-parameters. Results go to `out/synthetic.json`; a run that is already
under `out/evidence/synthetic/`, of the same settings, is not repeated.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from fp16_patch.mismatch.statistics.summary import MismatchStats
from integration.bench.command import Bench, parser, results_folder
from integration.bench.rounded_policy import Cache, RoundedPolicy
from integration.bench.rounding import Precision
from integration.cpu.tiny_model import character_model, character_tokenizer
from integration.demo import make_model
from integration.demo.task import Problem, compute_score, problems

SEEDS = (0, 1, 2)
# Half a binade: as far as two grids can lie apart.
OTHER_PHASE = math.sqrt(2)
MISMATCH = ("mean_abs", "seq_mean_abs", "k3")
REWARDS = ("start_reward", "peak_reward", "final_reward", "learner_reward")
FIGURES = (*REWARDS, "fall", *MISMATCH)


@dataclass(frozen=True)
class Settings:
    """The same for every arm; `window` is the steps over which a reward is averaged."""

    bits: int = 1
    steps: int = 200
    window: int = 25
    # At twice this rate the precision alone undoes a run: with no mismatch, seed 1 fell from 0.16 to 0.09.
    learning_rate: float = 2.5e-4
    max_grad_norm: float = 1.0
    problems: int = 32
    problems_a_step: int = 8
    samples_a_problem: int = 8
    max_response: int = 26
    hidden_size: int = 96
    layers: int = 2


@dataclass(frozen=True)
class Size:
    """What is run: the trainings, on which seeds, added to the bench's; steps of teaching that a model begins with."""

    seeds: tuple[int, ...] = SEEDS
    settings: Settings = field(default_factory=Settings)
    lessons: int = make_model.MAX_STEPS


@dataclass(frozen=True)
class Arm:
    """The precision of each side, None for FP32."""

    learner: Precision | None
    sampler: Precision | None


def arms(bits: int) -> dict[str, Arm]:
    """Name the arms. The sampler is the same in all but the reference; what differs there is the learner's rounding."""
    low, other = Precision(bits), Precision(bits, OTHER_PHASE)
    return {
        "fp32": Arm(None, None),
        "same rounding": Arm(low, low),
        "other rounding": Arm(other, low),
        "fp32 learner": Arm(None, low),
    }


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses, each (sequences, tokens); `mask` is true up to the end token, itself included."""

    prompts: Tensor
    tokens: Tensor
    log_probs: Tensor
    mask: Tensor
    rewards: Tensor


def measure_size(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Measure what a size says; see `measure`."""
    # Its bars would break ours.
    disable_progress_bar()
    return measure(out, [seed + number for number in size.seeds], size.settings, size.lessons)


def measure(
    out: Path,
    seeds: Sequence[int] = SEEDS,
    settings: Settings | None = None,
    lessons: int = make_model.MAX_STEPS,
) -> dict[str, Any]:
    """Train every arm on every seed, on one thread; returns curves by arm and seed, and their summary by arm."""
    settings = settings or Settings()
    folder = out / "synthetic"
    folder.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        models = {seed: _model_folder(folder, settings, seed, lessons) for seed in seeds}
        curves: dict[str, dict[str, Any]] = {name: {} for name in arms(settings.bits)}
        with _progress() as progress:
            for seed, (name, arm) in itertools.product(seeds, arms(settings.bits).items()):
                result = folder / f"{settings.bits}-bit {name} {seed}.json".replace(" ", "-")
                known = _kept(result, settings)
                if known is None:
                    known = run(models[seed], arm, settings, seed, _advance(progress, f"seed {seed}, {name}", settings))
                    result.write_text(json.dumps({"settings": asdict(settings), "run": known}) + "\n")
                curves[name][str(seed)] = known | figures(known["curves"], settings.window)
    return {
        "label": "synthetic",
        "settings": asdict(settings),
        "seeds": list(seeds),
        "arms": curves,
        "summary": summarize(curves),
    }


def run(
    model_folder: Path, arm: Arm, settings: Settings, seed: int, advance: Callable[[float], None]
) -> dict[str, Any]:
    """Train once; returns the curves, by step the reward and the mismatch.

    `learner_reward` is that of the trained weights when the learner itself samples, in its own precision.
    """
    started = time.process_time()
    model = Qwen2ForCausalLM.from_pretrained(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    tokenizer, pool, draw = character_tokenizer(), problems(settings.problems, seed), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {name: [] for name in ("reward", *MISMATCH)}
    for _ in range(settings.steps):
        asked = _repeated(draw.sample(pool, settings.problems_a_step), settings)
        rollouts = sample(RoundedPolicy(model, arm.sampler), tokenizer, asked, settings, generator)
        learner = update(model, optimizer, rollouts, arm.learner, settings)
        for name, value in _measured(rollouts, learner).items():
            curves[name].append(value)
        advance(curves["reward"][-1])
    after = sample(RoundedPolicy(model, arm.learner), tokenizer, _repeated(pool, settings), settings, generator)
    return {
        "learner_reward": float(after.rewards.mean()),
        "cpu_seconds": round(time.process_time() - started, 1),
        "curves": curves,
    }


@torch.no_grad()
def sample(
    policy: RoundedPolicy,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Problem],
    settings: Settings,
    generator: torch.Generator,
) -> Rollouts:
    """Sample one response to each of `asked` at temperature 1, with the log-probs of its tokens, in nats."""
    prompts = torch.tensor(tokenizer([problem.prompt for problem in asked])["input_ids"])
    cache, last = Cache(), prompts
    ended = torch.zeros(len(asked), dtype=torch.bool)
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    masks: list[Tensor] = []
    while len(tokens) < settings.max_response and not ended.all():
        predicted = policy.logits(last, cache)[:, -1].log_softmax(-1)
        last = torch.multinomial(predicted.exp(), 1, generator=generator)
        tokens.append(last)
        log_probs.append(predicted.gather(1, last))
        masks.append(~ended)
        ended = ended | (last[:, 0] == tokenizer.eos_token_id)
    responses, mask = torch.cat(tokens, 1), torch.stack(masks, 1)
    texts = tokenizer.batch_decode(responses.masked_fill(~mask, tokenizer.pad_token_id), skip_special_tokens=True)
    rewards = [compute_score("", text, problem.answer) for text, problem in zip(texts, asked, strict=True)]
    return Rollouts(prompts, responses, torch.cat(log_probs, 1), mask, torch.tensor(rewards))


def update(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    precision: Precision | None,
    settings: Settings,
) -> Tensor:
    """Step on `−Σ A log π_learner / tokens`, A the reward less its problem's mean; returns log π_learner.

    The sampler's log-probs are not in it, as in a framework that takes its rollouts to be on-policy.
    """
    learner = learner_log_probs(RoundedPolicy(model, precision), rollouts)
    by_problem = rollouts.rewards.view(-1, settings.samples_a_problem)
    advantages = (by_problem - by_problem.mean(1, keepdim=True)).view(-1, 1)
    loss = -(advantages * learner * rollouts.mask).sum() / rollouts.mask.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()
    return learner.detach()


def learner_log_probs(policy: RoundedPolicy, rollouts: Rollouts) -> Tensor:
    """Compute log π of the responses' tokens, (sequences, tokens), in one forward over prompt and response."""
    first = rollouts.prompts.shape[1] - 1
    logits = policy.logits(torch.cat([rollouts.prompts, rollouts.tokens], 1)[:, :-1])[:, first:]
    return logits.log_softmax(-1).gather(-1, rollouts.tokens[..., None]).squeeze(-1)


def figures(curves: dict[str, list[float]], window: int) -> dict[str, float]:
    """Average rewards over `window` steps: the first, the best, the last; and the mismatch over all steps."""
    reward = torch.tensor(curves["reward"], dtype=torch.float64).unfold(0, window, 1).mean(1)
    start, peak, final = float(reward[0]), float(reward.max()), float(reward[-1])
    rewards = {"start_reward": start, "peak_reward": peak, "final_reward": final, "fall": peak - final}
    return rewards | {name: statistics.fmean(curves[name]) for name in MISMATCH}


def summarize(curves: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Spread each figure of an arm over seeds: mean, least and greatest.

    `final_below_same` is the final reward of the arm "same rounding" less this arm's, seed by seed.
    """
    summary, same = {}, curves["same rounding"]
    for name, runs in curves.items():
        summary[name] = {figure: _spread([result[figure] for result in runs.values()]) for figure in FIGURES}
        below = [same[seed]["final_reward"] - result["final_reward"] for seed, result in runs.items()]
        summary[name]["final_below_same"] = _spread(below)
    return summary


def show(measured: dict[str, Any], console: Console) -> None:
    """Print rewards with their least and greatest over the seeds below; of the mismatch the mean alone."""
    seeds = ", ".join(map(str, measured["seeds"]))
    title = f"synthetic: {measured['settings']['bits']} mantissa bits, seeds {seeds}"
    table = Table("arm", title=title, pad_edge=False)
    for reward in ("start", "peak", "final", "learner alone"):
        table.add_column(reward, min_width=len("0.00…0.00"))
    table.add_column("mean\n|d|")
    table.add_column("mean\n|Σd|")
    for name, summary in measured["summary"].items():
        rewards = ("{mean:.2f}\n{min:.2f}…{max:.2f}".format(**summary[figure]) for figure in REWARDS)
        table.add_row(name, *rewards, *(f"{summary[figure]['mean']:.1e}" for figure in ("mean_abs", "seq_mean_abs")))
    console.print(table)


def _measured(rollouts: Rollouts, learner: Tensor) -> dict[str, float]:
    mismatch = MismatchStats.from_log_probs(rollouts.log_probs, learner, rollouts.mask).metrics("")
    return {"reward": float(rollouts.rewards.mean())} | {name: float(f"{mismatch[name]:.4g}") for name in MISMATCH}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def _repeated(asked: Sequence[Problem], settings: Settings) -> list[Problem]:
    return [problem for problem in asked for _ in range(settings.samples_a_problem)]


def _model_folder(folder: Path, settings: Settings, seed: int, lessons: int) -> Path:
    """Make the model that every arm of the seed starts from, taught by worked examples, if it is not there yet."""
    model_folder = folder / f"model-{settings.hidden_size}x{settings.layers}-{seed}"
    if not model_folder.is_dir():
        tokenizer = character_tokenizer()
        model = character_model(tokenizer, hidden_size=settings.hidden_size, layers=settings.layers, seed=seed)
        make_model.train(model, tokenizer, seed, lessons)
        # Written under another name first: an interrupted write must not pass for the model.
        unfinished = folder / "model-unfinished"
        model.save_pretrained(unfinished)
        unfinished.rename(model_folder)
    return model_folder


def _kept(result: Path, settings: Settings) -> dict[str, Any] | None:
    """Read the run in `result`, if there is one and it was measured with these settings."""
    if not result.is_file():
        return None
    kept = json.loads(result.read_text())
    return dict(kept["run"]) if kept["settings"] == asdict(settings) else None


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _progress() -> Progress:
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}")
    return Progress(
        *columns, TextColumn("reward {task.fields[reward]:.2f}"), TimeElapsedColumn(), TimeRemainingColumn()
    )


def _advance(progress: Progress, description: str, settings: Settings) -> Callable[[float], None]:
    task = progress.add_task(description, total=settings.steps, reward=float("nan"))
    return lambda reward: progress.update(task, advance=1, reward=reward)


SMOKE = Size(
    seeds=(0,),
    settings=Settings(steps=2, window=2, problems=2, problems_a_step=2, samples_a_problem=2, hidden_size=32),
    lessons=1,
)
BENCH = Bench("synthetic", measure_size, show, full=Size(), smoke=SMOKE, folder="evidence")


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="added to --seed")
    made.add_argument("--bits", type=int, default=Settings.bits, help="mantissa bits of the rounded operands")
    arguments = made.parse_args(argv)
    asked = Size(tuple(arguments.seeds), Settings(bits=arguments.bits))
    with results_folder(arguments.out, smoke=arguments.smoke) as out:
        BENCH.run(out, arguments.seed, SMOKE if arguments.smoke else asked)


if __name__ == "__main__":
    main()
