"""Count optimizer steps lost at the start of the demo's run: torch's first loss scale beside the probe's.

python -m integration.bench.first_scale
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp16_patch.mismatch.record.reading import load_run
from fp16_patch.probe.examining import ProbeRequest, examine
from integration.bench.command import Bench
from integration.cpu.arms import ARMS, record_of
from integration.cpu.launch import LaunchConfig, run
from integration.demo import make_model
from integration.demo.run import prepare
from integration.demo.side_by_side import STEPS


@dataclass(frozen=True)
class Size:
    """Steps of each run, responses of the probe, and what is put into the model."""

    steps: int = STEPS
    responses: int = 32
    model: make_model.Effort = make_model.FULL


def measure(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Run `stock` and `probed`; of each the first scale, and the steps that were skipped."""
    config = prepare(out, size.steps, Console(quiet=True), size.model)
    result = examine(
        ProbeRequest(
            config.model, prompts=config.train_files, sampler="hf", dtypes=("fp32",), count=size.responses, seed=seed
        )
    )
    result.write(out / "probe.json")
    stock = {"FP16_PATCH_INIT_SCALE": "65536", "FP16_PATCH_ON_OVERFLOW": "skip"}
    probed = {"FP16_PATCH_PROBE": str((out / "probe.json").resolve()), "FP16_PATCH_ON_OVERFLOW": "skip"}
    return {
        "stock": _run(replace(config, env={**config.env, **stock}), out / "stock"),
        "probed": _run(replace(config, env={**config.env, **probed}), out / "probed"),
        "largest_scale": None if result.gradients is None else result.gradients["largest_scale"],
    }


def _run(config: LaunchConfig, out: Path) -> dict[str, Any]:
    ended = run(ARMS["fp16_patch"].applied_to(config, out))
    if not ended.ok:
        raise RuntimeError(f"{out}: {ended.reason or ended.returncode}\n{ended.tail()}")
    record = load_run(record_of(out))
    return {
        "init_scale": record.plan["init_scale"],
        "skipped": record.summary()["skipped"],
        "loss_scale": list(record.series("fp16/loss_scale").values()),
    }


def show(measured: dict[str, Any], console: Console) -> None:
    table = Table("first scale", "", "optimizer steps skipped", "loss scale, step by step")
    for name in ("stock", "probed"):
        found = measured[name]
        scales = ", ".join(f"{scale:g}" for scale in found["loss_scale"])
        table.add_row(name, f"{found['init_scale']:g}", str(found["skipped"]), scales)
    console.print(table)


SMOKE = Size(steps=1, responses=2, model=make_model.SMOKE)
BENCH = Bench("first_scale", measure, show, full=Size(), smoke=SMOKE)

if __name__ == "__main__":
    BENCH.main(__doc__)
