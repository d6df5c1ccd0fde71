"""Compare torch's rule of when the loss scale may grow with the one that looks ahead, on the same updates.

    python -m integration.bench.scale_rule

The engine is verl's own, FSDP. GRPO's gradients vary from one update to the next: a group's advantages are its rewards,
normalized, and a token of a short response weighs more than one of a long. Besides, one update in so many has
advantages 16 times as large (`spikes`). The scale may grow after every tenth update, so that growing matters in a run
this short.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from integration.bench.command import Bench
from integration.bench.ranks import PLAN, on_ranks
from integration.bench.retry import ADVANTAGE, DROPOUT, HUGE
from integration.bench.verl_updates import SEQUENCES, Learner
from integration.cpu.tiny_model import make_random_model

WORK = "integration.bench.scale_rule:answer"
GROWTH_INTERVAL, LOOK_EVERY = 10, 5
SHORTEST, LONGEST = 4, 32
# Every so many updates has huge advantages; 0 for none.
SPIKES = {"grpo": 0, "grpo, spikes": 37}
RULES, ON_OVERFLOW = ("torch", "ahead"), ("retry", "skip")
FP16_MAX, USABLE = 65504.0, 4.0


@dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        updates: of a run.
        seeds: runs of each arm.
        spikes: workload → every so many updates has huge advantages; 0 for none.
        layers: of the model.
        timed: updates of the run that takes the time of a look.
        width, depth: of its larger model.
    """

    updates: int = 200
    seeds: int = 2
    spikes: Mapping[str, int] = field(default_factory=lambda: SPIKES)
    layers: int = 4
    timed: int = 16
    width: int = 512
    depth: int = 8


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Run each workload under each rule, with `retry` and `skip`; the summaries are of all seeds together."""
    model = make_random_model(out / "model", layers=size.layers)
    settings = {"FP16_PATCH_GROWTH_INTERVAL": str(GROWTH_INTERVAL), "FP16_PATCH_GRADIENT_LOOK_EVERY": str(LOOK_EVERY)}

    def of(rule: str, on_overflow: str, every: int) -> dict[str, Any]:
        plan = {**PLAN, **settings, "FP16_PATCH_SCALE_RULE": rule, "FP16_PATCH_ON_OVERFLOW": on_overflow}
        asked = {"model": str(model), "updates": size.updates, "spike_every": every}
        runs = [on_ranks(WORK, {**asked, "seed": seed + number}, plan)["updates"] for number in range(size.seeds)]
        return summary(runs)

    return {
        "look_cost": look_cost(out, size),
        "updates": size.updates * size.seeds,
        "growth_interval": GROWTH_INTERVAL,
        "look_every": LOOK_EVERY,
        "workloads": {
            workload: {how: {rule: of(rule, how, every) for rule in RULES} for how in ON_OVERFLOW}
            for workload, every in size.spikes.items()
        },
    }


def look_cost(out: Path, size: Size) -> float:
    """Time an update that is looked at ÷ one that is not, alternating in one run of a larger model."""
    model = make_random_model(out / "larger", hidden_size=size.width, layers=size.depth)
    plan = {**PLAN, "FP16_PATCH_GRADIENT_LOOK_EVERY": "2"}
    seconds = on_ranks(WORK, {"model": str(model), "updates": size.timed, "timed": True, "seed": 0}, plan)["seconds"]
    # The first ones warm up and measure the first scale.
    return statistics.median(seconds[4::2]) / statistics.median(seconds[5::2])


def summary(runs: list[list[dict[str, float]]]) -> dict[str, float]:
    """Summarize runs, each a list of updates as `answer` gives them.

    The first of each, which measures its scale, is left out.

    `usable` is the share of the updates that were taken at a scale that is at most `USABLE` times below the largest
    which the update's own gradients bear; `underflow` is the mean share of FP16 gradients that are zero or subnormal,
    as `fp16_patch.scaling.gradient_stats.GradientCounts` counts them.
    """
    updates = [update for run in runs for update in run[1:]]
    taken = [update for update in updates if not update["skipped"]]
    room = [FP16_MAX / update["largest"] for update in taken]
    return {
        "overflows": sum(update["overflows"] for update in updates),
        "skips": len(updates) - len(taken),
        "extra_passes": sum(update["passes"] - 1 for update in updates) / len(updates),
        "usable": sum(1 <= spare < USABLE for spare in room) / len(updates),
        "room": statistics.median(room),
        "underflow": statistics.mean(update["underflow"] for update in taken),
        "spread": max(update["unscaled"] for update in taken)
        / statistics.median(update["unscaled"] for update in taken),
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, which is a rank's; say of each update its passes, its overflows and its last gradients."""
    import torch

    if request.get("timed"):
        return {"seconds": _timed(Learner(Path(request["model"]), request["updates"]), request["updates"])}
    learner = _Looked(Path(request["model"]), request["updates"])
    torch.manual_seed(request["seed"])
    every = request["spike_every"]
    return {
        "updates": [
            learner.grpo(request["seed"] * 10_000 + number, HUGE if every and number % every == every - 1 else 1.0)
            for number in range(request["updates"])
        ]
    }


def _timed(learner: Learner, updates: int) -> list[float]:
    seconds = []
    for number in range(updates):
        started = time.perf_counter()
        learner.update(number, 1.0)
        seconds.append(time.perf_counter() - started)
    return seconds


class _Looked(Learner):
    """Every pass of its engine is looked at, whatever the plan looks at."""

    def __init__(self, model: Path, updates: int) -> None:
        super().__init__(model, updates, dropout=DROPOUT)
        self._compute = self.engine.forward_backward_batch
        self.engine.forward_backward_batch = self._look
        self._passes: list[dict[str, float]] = []

    def grpo(self, seed: int, size: float) -> dict[str, float]:
        """An update on one group of responses."""
        import torch

        self._passes.clear()
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (SEQUENCES,), generator=generator).tolist()
        rows = [torch.randint(2, 90, (length,), generator=generator) for length in lengths]
        rewards = torch.zeros(SEQUENCES)
        rewards[: int(torch.randint(1, SEQUENCES, (1,), generator=generator))] = 1.0
        advantages = size * ADVANTAGE * (rewards - rewards.mean()) / rewards.std()
        of_tokens = [torch.full((length,), float(one)) for length, one in zip(lengths, advantages, strict=True)]
        became = self.train(rows, advantages=of_tokens)
        overflows = sum(seen["largest"] > FP16_MAX for seen in self._passes)
        return {**self._passes[-1], **became, "passes": len(self._passes), "overflows": overflows}

    def loss(self, model_output: dict[str, Any], data: Any, dp_group: Any) -> tuple[Any, dict[str, Any]]:
        """verl's `seq-mean-token-mean`."""
        pairs = zip(model_output["log_probs"].unbind(), data["advantages"].unbind(), strict=True)
        means = [-(log_probs.float() * advantages).mean() for log_probs, advantages in pairs]
        return sum(means) / len(means), {}

    def _look(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        from fp16_patch.scaling.gradient_stats import GradientCounts, GradientStatsHooks
        from fp16_patch.scaling.tensor_range import largest_gradient

        scale = float(self.engine.scaler.get_scale())
        with GradientStatsHooks(self.engine.module) as hooks:
            result = self._compute(*args, **kwargs)
        largest = largest_gradient(hooks.largest(), torch.float16)
        total = GradientCounts()
        for counts in hooks.counts().values():
            total = total.plus(counts)
        underflow = total.shares().get("underflow", 0.0)
        self._passes.append({"largest": largest, "unscaled": largest / scale, "underflow": underflow, "scale": scale})
        return result


COLUMNS: dict[str, Callable[[dict[str, float]], str]] = {
    "overflows": lambda found: f"{found['overflows']:g}",
    "skipped updates": lambda found: f"{found['skips']:g}",
    "extra passes": lambda found: f"{found['extra_passes']:.1%}",
    "underflow": lambda found: f"{found['underflow']:.1e}",
    "usable scale": lambda found: f"{found['usable']:.0%}",
    "room, median": lambda found: f"{found['room']:.1f}",
}


def show(measured: dict[str, Any], console: Console) -> None:
    table = Table("gradients", "on_overflow", "scale_rule", *COLUMNS)
    for workload, arms in measured["workloads"].items():
        for how, rules in arms.items():
            for rule, found in rules.items():
                table.add_row(workload, how, rule, *(column(found) for column in COLUMNS.values()))
    console.print(table)
    console.print(f"an update that is looked at takes {measured['look_cost']:.3f} times as long")


SMOKE = Size(updates=4, seeds=1, spikes={"grpo, spikes": 2}, layers=1, timed=6, width=128, depth=1)
BENCH = Bench("scale_rule", measure, show, full=Size(), smoke=SMOKE)

if __name__ == "__main__":
    BENCH.main(__doc__)
