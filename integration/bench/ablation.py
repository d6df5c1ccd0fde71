"""Train with learner and sampler in dtypes of their own, every pair of three on real verl, as the paper's ablation.

    python -m integration.bench.ablation                      # nine runs
    python -m integration.bench.ablation --pairs fp16/bf16    # these, learner/sampler

The plan decides the learner's dtype; a module of this bench alone, `planted/sampler_apart.py`, decides the sampler's
and tells the ledger, which proves the pair in every process before the first step. fp16_patch itself refuses such a
run. Results go to `out/ablation.json`; a run of the same settings that is already under `out/evidence/ablation/` is not
repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp16_patch.mismatch.record.reading import Ledger
from fp16_patch.plan.dtypes import torch_name
from integration.bench import offline, solvable, training
from integration.bench.command import Bench, parser, results_folder
from integration.bench.training import Settings, Training, ends, mean, trained
from integration.demo import make_model

PLANTS = Path(__file__).with_name("planted")
STEPS = 6
MODES = ("fp32", "fp16", "bf16")
PAIRS = tuple(f"{learner}/{sampler}" for learner in MODES for sampler in MODES)
# What is in the ledger of each side that only its compute dtype can be in.
PROVED = {"actor": ("autocast", "parameter", "activation"), "rollout": ("engine_weight", "kv_cache", "activation")}


@dataclass(frozen=True)
class Size:
    """The pairs that are trained, how, on which problems, from which model."""

    pairs: tuple[str, ...] = PAIRS
    settings: Settings = field(default_factory=lambda: Settings(STEPS))
    problems: solvable.Draw = solvable.DRAW
    model: make_model.Effort = make_model.FULL


SMOKE = Size(("fp16/bf16",), training.SMOKE, solvable.SMOKE, make_model.SMOKE)


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Train each `learner/sampler`; of each curves, mean |d| over all steps, reward at the end, proved dtypes.

    Raises:
        RuntimeError: a run failed, or its ledger proves another pair.
    """
    folder = out / "ablation"
    model = offline.demo_checkpoint(out / "models", 0, size.model)
    # Those of the sanity runs: the same model has the same.
    problems = solvable.prepare(model, out / "sanity" / "data", size.problems)
    found = {}
    for pair in size.pairs:
        run = trained(training_of(pair, seed), size.settings, model, problems, folder, Console())
        found[pair] = run | {"mean_abs": mean(run["curves"]["mean_abs"]), "last_quarter": ends(run["curves"])}
        if proved(run["ledger"]) != wanted(pair):
            raise RuntimeError(f"{pair}: the ledger has {proved(run['ledger'])}")
    return {"settings": vars(size.settings), "seed": seed, "pairs": found}


def training_of(pair: str, seed: int) -> Training:
    """Return the training of `learner/sampler`."""
    learner, sampler = pair.split("/")
    env = {
        "FP16_PATCH": learner,
        "BENCH_SAMPLER": sampler,
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,sampler_apart",
        "PYTHONPATH": str(PLANTS),
    }
    return Training(pair.replace("/", "-"), seed, env=env)


def proved(ledger: Ledger) -> dict[str, list[str]]:
    """Read which dtypes each side computed in from the ledger."""
    return {
        role: sorted({dtype for quantity in quantities for dtype in ledger.get(role, {}).get(quantity, [])})
        for role, quantities in PROVED.items()
    }


def wanted(pair: str) -> dict[str, list[str]]:
    """Return which dtypes each side of `learner/sampler` has to compute in."""
    return {role: [torch_name(mode)] for role, mode in zip(PROVED, pair.split("/"), strict=True)}


def show(measured: dict[str, Any], console: Console) -> None:
    title = f"{measured['settings']['steps']} steps, seed {measured['seed']}"
    table = Table("learner/sampler", "mean |d|", "step 1", "last quarter", "reward, last quarter", title=title)
    for pair, run in measured["pairs"].items():
        curve, last = run["curves"]["mean_abs"], run["last_quarter"]
        gaps = (run["mean_abs"], curve[0], last["mean_abs"])
        table.add_row(pair, *("–" if gap is None else f"{gap:.1e}" for gap in gaps), f"{last['reward']:.2f}")
    console.print(table)
    console.print(f"{sum(run['seconds'] for run in measured['pairs'].values()) / 60:.0f} minutes of runs")


BENCH = Bench("ablation", measure, show, full=Size(), smoke=SMOKE, folder="evidence")


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    arguments = made.parse_args(argv)
    asked = Size(tuple(arguments.pairs), Settings(arguments.steps))
    with results_folder(arguments.out, smoke=arguments.smoke) as out:
        BENCH.run(out, arguments.seed, SMOKE if arguments.smoke else asked)


if __name__ == "__main__":
    main()
