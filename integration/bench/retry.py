"""Mini-batches lost to overflows by verl's own FSDP engine: dropped as its scaler does, and tried again.

    python -m integration.bench.retry

The same 200 updates of one model on the same tokens, ten of which have advantages 16 times as large, so that their
gradients overflow at the scale that the others bear. Before each of the ten the scale is put back to that level, where
growing would have taken it in a longer run. And whether a step tried again is, to the last bit, the step of a run that
started at its scale.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from integration.bench.verl_updates import Learner, answered_to, ran
from integration.cpu.tiny_model import make_random_model

MODULE = "integration.bench.retry"
UPDATES, PLANTED = 200, range(15, 200, 20)
# Makes the gradients of the random model overflow at 65536, and those of a planted update four halvings below.
ADVANTAGE, HUGE, DROPOUT = 16.0, 16.0, 0.2
SKIPS = {
    "FP16_PATCH_ON_OVERFLOW": "skip",
    "FP16_PATCH_INIT_SCALE": "65536",
    "FP16_PATCH_SCALE_RULE": "torch",
    "FP16_PATCH_FUSED_STEP": "0",
}
RETRIES = {"FP16_PATCH_INIT_SCALE": "65536"}


def measure(out: Path, seed: int) -> dict[str, Any]:
    """`lost_*`: mini-batches of 200 that nobody trained on after the first step; `calibration_skips_*`: before it.

    `stock` drops a mini-batch and starts at torch's 65536, as verl's own scaler does; `ours` are the defaults.
    """
    model = make_random_model(out / "model")
    whole = {"updates": UPDATES, "planted": list(PLANTED), "model": str(model), "seed": seed}
    stock, ours = ran(MODULE, whole, SKIPS, 1), ran(MODULE, whole, {}, 1)
    return {
        "updates": UPDATES,
        "planted": len(PLANTED),
        "lost_stock": stock["lost"],
        "lost_ours": ours["lost"],
        "retries_ours": ours["retries"],
        "calibration_skips_stock": stock["calibration_skips"],
        "calibration_skips_ours": ours["calibration_skips"],
        "calibration_retries_ours": ours["calibration_retries"],
        "first_scale_ours": ours["scales"][0],
        "retry_bitwise": all(_is_bitwise(whole, ranks) for ranks in (1, 2)),
    }


def _is_bitwise(whole: dict[str, Any], ranks: int) -> bool:
    """Whether retries leave no trace: six updates from 65536, two of them planted, beside the same without a retry."""
    short = {**whole, "updates": 6, "planted": [2, 4]}
    found = ran(MODULE, short, RETRIES, ranks)
    clean = ran(MODULE, {**short, "scales": found["scales"]}, RETRIES, ranks)
    if not found["retries"] or clean["retries"] or found["lost"] or found["calibration_skips"]:
        raise RuntimeError(f"nothing to compare on {ranks} ranks: {found}, {clean}")
    return bool(found["state"] == clean["state"])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """In a rank's process: what became of each update.

    Args:
        request: with `scales`, each update starts at its own; without, at the scale of the former.
    """
    import torch
    import torch.distributed as dist

    learner = Learner(Path(request["model"]), UPDATES, dropout=DROPOUT)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--answer", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answered_to(*arguments.answer, work=answer)
        return
    out: Path = arguments.out.resolve() / "retry"
    out.mkdir(parents=True, exist_ok=True)
    measured = measure(out, arguments.seed)
    (out / "retry.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
