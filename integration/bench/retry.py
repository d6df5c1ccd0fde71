"""Count the mini-batches lost to overflows by verl's own FSDP engine: dropped as its scaler does, and tried again.

    python -m integration.bench.retry

The same 200 updates of one model on the same tokens, ten of which have advantages 16 times as large, so that their
gradients overflow at the scale that the others bear. Before each of the ten the scale is put back to that level, where
growing would have taken it in a longer run. And whether a step tried again is, to the last bit, the step of a run that
started at its scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from integration.bench.command import Bench
from integration.bench.ranks import PLAN, on_ranks
from integration.bench.verl_updates import Learner
from integration.cpu.tiny_model import make_random_model

WORK = "integration.bench.retry:answer"
# Makes the gradients of the random model overflow at 65536, and those of a planted update four halvings below.
ADVANTAGE, HUGE, DROPOUT = 16.0, 16.0, 0.2
SKIPS = {
    "FP16_PATCH_ON_OVERFLOW": "skip",
    "FP16_PATCH_INIT_SCALE": "65536",
    "FP16_PATCH_SCALE_RULE": "torch",
    "FP16_PATCH_FUSED_STEP": "0",
}
RETRIES = {"FP16_PATCH_INIT_SCALE": "65536"}


@dataclass(frozen=True)
class Size:
    """Updates of the run, which of them overflow, numbers of ranks that a retry is compared on, layers of the model."""

    updates: int = 200
    planted: tuple[int, ...] = tuple(range(15, 200, 20))
    ranks: tuple[int, ...] = (1, 2)
    layers: int = 4


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Count lost mini-batches: `lost_*` after the first step, `calibration_skips_*` before it.

    `stock` drops a mini-batch and starts at torch's 65536, as verl's own scaler does; `ours` are the defaults.
    """
    model = make_random_model(out / "model", layers=size.layers)
    planted = list(size.planted)
    whole = {"updates": size.updates, "schedule": size.updates, "planted": planted, "model": str(model), "seed": seed}
    stock, ours = (on_ranks(WORK, whole, {**PLAN, **settings}) for settings in (SKIPS, {}))
    return {
        "updates": size.updates,
        "planted": len(size.planted),
        "lost_stock": stock["lost"],
        "lost_ours": ours["lost"],
        "retries_ours": ours["retries"],
        "calibration_skips_stock": stock["calibration_skips"],
        "calibration_skips_ours": ours["calibration_skips"],
        "calibration_retries_ours": ours["calibration_retries"],
        "first_scale_ours": ours["scales"][0],
        "retry_bitwise": all(_is_bitwise(whole, ranks) for ranks in size.ranks),
    }


def _is_bitwise(whole: dict[str, Any], ranks: int) -> bool:
    """Whether retries leave no trace: six updates from 65536, two of them planted, beside the same without a retry."""
    short, plan = {**whole, "updates": 6, "planted": [2, 4]}, {**PLAN, **RETRIES}
    found = on_ranks(WORK, short, plan, ranks)
    clean = on_ranks(WORK, {**short, "scales": found["scales"]}, plan, ranks)
    if not found["retries"] or clean["retries"] or found["lost"] or found["calibration_skips"]:
        raise RuntimeError(f"nothing to compare on {ranks} ranks: {found}, {clean}")
    return bool(found["state"] == clean["state"])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, which is a rank's, and say what became of each update.

    Args:
        request: `schedule` is the length of the learning rate's; with `scales`, each update starts at its own;
            without, at the scale of the former.
    """
    import torch
    import torch.distributed as dist

    learner = Learner(Path(request["model"]), request["schedule"], dropout=DROPOUT)
    torch.manual_seed(request["seed"] + dist.get_rank())
    scales, metrics = [], []
    level = None
    for number in range(request["updates"]):
        planted = number in request["planted"]
        if "scales" in request:
            learner.start_at(request["scales"][number])
        elif planted and level is not None:
            learner.start_at(level)
        huge = planted and dist.get_rank() == dist.get_world_size() - 1
        metrics.append(learner.update(request["seed"] + number, ADVANTAGE * (HUGE if huge else 1.0)))
        scales.append(float(learner.engine.scaler.get_scale()))
        level = scales[-1] if level is None and not metrics[-1]["skipped"] else level
    skipped = [bool(step["skipped"]) for step in metrics]
    first = skipped.index(False)
    return {
        "lost": sum(skipped[first:]),
        "calibration_skips": first,
        "calibration_retries": metrics[first]["retries_total"],
        "retries": metrics[-1]["retries_total"],
        "scales": scales,
        "state": learner.state(),
    }


def show(measured: dict[str, Any], console: Console) -> None:
    console.print_json(data=measured)


BENCH = Bench("retry", measure, show, full=Size(), smoke=Size(updates=6, planted=(4,), ranks=(2,), layers=1))

if __name__ == "__main__":
    BENCH.main(__doc__)
