"""Make the demo's model: a small character model that solves about half of the task, so that RL has work to do."""

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Lets this file run by its path, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from integration.bench import command
from integration.cpu.tiny_model import character_model, character_tokenizer
from integration.demo.task import Problem, compute_score, problems

HIDDEN_SIZE = 192
LAYERS = 4
BATCH = 96
MAX_STEPS = 400
WARMUP_STEPS = 20
LEARNING_RATE = 2e-3
CHECK_EVERY = 20
# Midway between too hard (no sample of a group rewarded) and solved (all are): both leave GRPO without a signal.
ENOUGH_SOLVED = 0.45
MAX_RESPONSE = 32
HELD_OUT_SEED = 10_007


@dataclass(frozen=True)
class Effort:
    """What is put into a model: its width and depth, steps of training at most, responses a problem it is judged by."""

    hidden_size: int = HIDDEN_SIZE
    layers: int = LAYERS
    steps: int = MAX_STEPS
    samples: int = 8


FULL = Effort()
# A model that has learned next to nothing; vLLM's CPU build has no attention for fewer than 32 dimensions a head.
SMOKE = Effort(hidden_size=128, layers=1, steps=CHECK_EVERY, samples=1)


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = MAX_STEPS
) -> list[dict[str, float]]:
    """Teach `model` the working until it solves enough, in `steps` at most; return what was seen at each check."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    checks: list[dict[str, float]] = []
    with _progress() as progress:
        task = progress.add_task("learning to add", total=steps, loss=float("nan"), solved=0.0)
        for step in range(1, steps + 1):
            loss = _update(model, optimizer, _examples(tokenizer, rng))
            schedule.step()
            progress.update(task, advance=1, loss=loss)
            if step % CHECK_EVERY:
                continue
            checks.append({"step": step, "loss": loss, **solve_rate(model, tokenizer, samples=1, seed=seed)})
            progress.update(task, solved=checks[-1]["solved"])
            if checks[-1]["solved"] >= ENOUGH_SOLVED:
                break
    return checks


def update(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, optimizer: torch.optim.Optimizer, seed: int
) -> float:
    """Take one step on a batch of examples; return its loss."""
    return _update(model, optimizer, _examples(tokenizer, random.Random(seed)))


@torch.no_grad()
def solve_rate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, samples: int, seed: int
) -> dict[str, float]:
    """Measure the share of held-out problems solved by `samples` responses each at temperature 1.

    Returns:
        `solved`; `entropy` in nats a token, and `tokens` of a response.
    """
    torch.manual_seed(seed)
    asked = [problem for problem in problems(128, HELD_OUT_SEED) for _ in range(samples)]
    prompts = torch.tensor(tokenizer([problem.prompt for problem in asked])["input_ids"])
    tokens, entropy = _sample(model, prompts)
    ended = (tokens == tokenizer.eos_token_id).cumsum(1)
    written = (ended - (tokens == tokenizer.eos_token_id).long()) == 0
    texts = tokenizer.batch_decode(tokens.masked_fill(~written, tokenizer.pad_token_id), skip_special_tokens=True)
    scores = [compute_score("", text, problem.answer) for text, problem in zip(texts, asked, strict=True)]
    return {
        "solved": sum(scores) / len(scores),
        "entropy": float(entropy[written].mean()),
        "tokens": float(written.sum(1).float().mean()),
    }


def _progress() -> Progress:
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}")
    measured = TextColumn("loss {task.fields[loss]:.3f}  solved {task.fields[solved]:.0%}")
    return Progress(*columns, measured, TimeRemainingColumn())


def _examples(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of one batch; the prompt is given, not learned."""
    drawn = [Problem(rng.randrange(100), rng.randrange(100)) for _ in range(BATCH)]
    texts = [problem.prompt + problem.worked(rng) + tokenizer.eos_token for problem in drawn]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    labels = ids.clone()
    labels[:, : len(drawn[0].prompt)] = -100
    return ids, labels


def _update(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, examples: tuple[torch.Tensor, torch.Tensor]
) -> float:
    ids, labels = examples
    logits = model(ids[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _sample(model: PreTrainedModel, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled tokens and the policy's entropy at each, both (problem, position); meaningless past the end token."""
    tokens, entropies = [], []
    output = model(prompts, use_cache=True)
    for _ in range(MAX_RESPONSE):
        policy = torch.distributions.Categorical(logits=output.logits[:, -1])
        tokens.append(policy.sample())
        entropies.append(policy.entropy())
        output = model(tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
    return torch.stack(tokens, 1), torch.stack(entropies, 1)


def make(out: Path, seed: int, effort: Effort = FULL) -> None:
    """Train a model and write it, its tokenizer and `meta.json` of what it can do."""
    tokenizer = character_tokenizer()
    model = character_model(tokenizer, hidden_size=effort.hidden_size, layers=effort.layers, seed=seed)
    started = time.monotonic()
    checks = train(model, tokenizer, seed, effort.steps)
    measured = solve_rate(model, tokenizer, samples=effort.samples, seed=seed)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    meta = {
        "seed": seed,
        "parameters": model.num_parameters(),
        "seconds": round(time.monotonic() - started, 1),
        **measured,
        "checks": checks,
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    click.echo(
        f"{out}: {meta['parameters']:,} parameters, solves {measured['solved']:.0%} of held-out problems, "
        f"{measured['entropy']:.2f} nats and {measured['tokens']:.0f} tokens a response"
    )


@click.command()
@click.argument("out", type=click.Path(path_type=Path), default=Path(__file__).parent / "out" / "model")
@click.option("--seed", default=0, show_default=True, help="Same seed, same model.")
@click.option("--smoke", is_flag=True, help=command.SMOKE_HELP)
def main(out: Path, seed: int, smoke: bool) -> None:
    """Train the demo model and write it, with its tokenizer and a meta.json of what it can do, to OUT."""
    with command.results_folder(out, smoke=smoke) as folder:
        make(folder, seed, SMOKE if smoke else FULL)


if __name__ == "__main__":
    main()
