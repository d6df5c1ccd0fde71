"""Repeat the paper's sanity run on real verl: problems solved 20 to 80 % of the time, trained in BF16 and in FP16.

    python -m integration.bench.sanity                                      # every algorithm
    python -m integration.bench.sanity --algorithms grpo gspo --seeds 0     # these, one seed
    python -m integration.bench.sanity --steps 60

The algorithms are verl's own, by its settings; the two arms of each differ in the precision alone, and no
hyper-parameter is tuned to either. The first algorithm is run on every seed, the others on the first seed. At this size
accuracy does not separate the precisions; the mismatch does. Results go to `out/sanity.json`; a run of the same
settings that is already under `out/evidence/sanity/` is not repeated.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from integration.bench import offline, solvable, training
from integration.bench.command import Bench, parser, results_folder
from integration.bench.training import ENDS, Settings, Training, ends, mean, spread, trained
from integration.cpu.arms import ARMS
from integration.demo import make_model

SEEDS = (0, 1, 2)
STEPS = 20
# Name here → in the table of arms.
COMPARED = {"bf16": "bf16", "fp16": "fp16_patch"}
LOSS, CORRECTION = "actor_rollout_ref.actor.policy_loss.loss_mode", "algorithm.rollout_correction"
# None is decoupled from the learner's own log-probs: with `bypass_mode` there would be no mismatch to measure.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "grpo": (),
    # −w A log π, A the reward less its problem's mean, w the sequence's importance weight, in effect not truncated.
    "pg-seq-is": (
        f"{LOSS}=gpg",
        "algorithm.norm_adv_by_std_in_grpo=False",
        f"{CORRECTION}.rollout_is=sequence",
        f"{CORRECTION}.rollout_is_threshold=1e6",
    ),
    # Ranges and averaging of its authors.
    "gspo": (
        f"{LOSS}=gspo",
        "actor_rollout_ref.actor.clip_ratio_low=3e-4",
        "actor_rollout_ref.actor.clip_ratio_high=4e-4",
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
    ),
    "grpo-token-tis": (f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=2.0"),
    # What verl's preset of the name sets.
    "grpo-seq-mis": (
        f"{CORRECTION}.rollout_is=sequence",
        f"{CORRECTION}.rollout_is_threshold=2.0",
        f"{CORRECTION}.rollout_rs=seq_sum_k1",
        f"{CORRECTION}.rollout_rs_threshold=0.5_2.0",
    ),
}
MAIN = "grpo"


@dataclass(frozen=True)
class Size:
    """What is run: each algorithm on the first seed, the first one on all; seeds are added to the bench's."""

    seeds: tuple[int, ...] = SEEDS
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    settings: Settings = field(default_factory=lambda: Settings(STEPS))
    problems: solvable.Draw = solvable.DRAW
    model: make_model.Effort = make_model.FULL


SMOKE = Size((0,), (MAIN,), training.SMOKE, solvable.SMOKE, make_model.SMOKE)


def measure_size(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Measure what a size says; see `measure`."""
    seeds = [seed + number for number in size.seeds]
    return measure(out, seeds, size.algorithms, size.settings, None, size.problems, size.model)


def measure(
    out: Path,
    seeds: Sequence[int] = SEEDS,
    algorithms: Sequence[str] = tuple(ALGORITHMS),
    settings: Settings | None = None,
    console: Console | None = None,
    draw: solvable.Draw = solvable.DRAW,
    effort: make_model.Effort = make_model.FULL,
) -> dict[str, Any]:
    """Train by algorithm, arm and seed; returns curves and their summary, see `integration.bench.training`."""
    settings, console = settings or Settings(STEPS), console or Console()
    folder = out / "sanity"
    model = offline.demo_checkpoint(out / "models", 0, effort)
    problems = solvable.prepare(model, folder / "data", draw)
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for planned, (algorithm, arm) in trainings(algorithms, seeds):
        found = trained(planned, settings, model, problems, folder, console)
        runs.setdefault(algorithm, {}).setdefault(arm, {})[str(planned.seed)] = found
    return {
        "settings": vars(settings),
        "seeds": list(seeds),
        "overrides": {name: list(ALGORITHMS[name]) for name in algorithms},
        "problems": problems.facts,
        "algorithms": runs,
        "summary": {name: summarize(arms) for name, arms in runs.items()},
    }


def trainings(algorithms: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[Training, tuple[str, str]]]:
    """Yield each with its algorithm and arm, seed by seed, so that an interrupted bench has whole pairs."""
    for place, seed in enumerate(seeds):
        for algorithm in algorithms:
            if place and algorithm != MAIN:
                continue
            for arm, name in COMPARED.items():
                overrides = (*ALGORITHMS[algorithm], *ARMS[name].overrides)
                yield Training(f"{algorithm}-{arm}-{seed}", seed, overrides, ARMS[name].env), (algorithm, arm)


def summarize(arms: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Average the last quarter of steps by arm, spread over seeds; by seed, the ratio of mean |d| of all steps.

    `reward_separates`: whether, of several seeds, the worst reward of one arm is above the best of the other; None of
    one seed.
    """
    summary: dict[str, Any] = {}
    for arm, runs in arms.items():
        by_seed = [ends(run["curves"]) for run in runs.values()]
        summary[arm] = {figure: spread([found[figure] for found in by_seed]) for figure in ("start_reward", *ENDS)}
        summary[arm]["skipped"] = sum(value or 0 for run in runs.values() for value in run["curves"]["skipped"])
    bf16, fp16 = (
        {seed: mean(run["curves"]["mean_abs"]) for seed, run in arms[arm].items()} for arm in ("bf16", "fp16")
    )
    ratios = {seed: bf16[seed] / fp16[seed] for seed in bf16}
    rewards = [summary[arm]["reward"] for arm in ("bf16", "fp16")]
    return summary | {
        "bf16 ÷ fp16": ratios,
        "ratio": spread([*ratios.values()]),
        "reward_difference": rewards[1]["mean"] - rewards[0]["mean"],
        "reward_separates": None if len(ratios) < 2 else apart(*rewards),
    }


def apart(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether the ranges of two spreads have no value in common."""
    return one["min"] > other["max"] or other["min"] > one["max"]


def show(measured: dict[str, Any], console: Console) -> None:
    problems, settings = measured["problems"], measured["settings"]
    console.print(
        f"{problems['kept']} of {problems['drawn']} problems are solved {problems['low']:.0%} to "
        f"{problems['high']:.0%} of the time, {problems['solve_rate_of_kept']:.0%} on average; "
        f"{settings['steps']} steps; reward and mismatch over the last quarter of them"
    )
    table = Table("algorithm", "arm", "seeds", "reward at first", "reward", "mean |d|", "mean |Σd|", "bf16 ÷ fp16")
    for algorithm, summary in measured["summary"].items():
        for arm in COMPARED:
            figures = summary[arm]
            table.add_row(
                algorithm,
                arm,
                ", ".join(measured["algorithms"][algorithm][arm]),
                f"{figures['start_reward']['mean']:.2f}",
                "{mean:.2f} ({min:.2f}…{max:.2f})".format(**figures["reward"]),
                *(f"{figures[name]['mean']:.1e}" for name in ("mean_abs", "seq_mean_abs")),
                ", ".join(f"{ratio:.1f}" for ratio in summary["bf16 ÷ fp16"].values()) if arm == "fp16" else "",
            )
    console.print(table)
    seconds = [
        run["seconds"] for arms in measured["algorithms"].values() for runs in arms.values() for run in runs.values()
    ]
    console.print(f"{len(seconds)} runs, {statistics.fmean(seconds) / 60:.1f} minutes each")


BENCH = Bench("sanity", measure_size, show, full=Size(), smoke=SMOKE, folder="evidence")


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="added to --seed")
    made.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    arguments = made.parse_args(argv)
    asked = Size(tuple(arguments.seeds), tuple(arguments.algorithms), Settings(arguments.steps))
    with results_folder(arguments.out, smoke=arguments.smoke) as out:
        BENCH.run(out, arguments.seed, SMOKE if arguments.smoke else asked)


if __name__ == "__main__":
    main()
