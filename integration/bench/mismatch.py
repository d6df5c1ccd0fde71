"""Compare sampler and learner on real verl, arm by arm: a table of `integration/README.md`.

    python -m integration.bench.mismatch            # every row, about three minutes a run on two cores
    python -m integration.bench.mismatch fsdp2-2    # the rows whose name starts so

Each row is one strategy and number of ranks; its runs differ in the arm alone. Ratios are of the bf16 run to each arm.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fp16_patch.mismatch.record.reading import load_run
from integration.bench import command
from integration.bench.warm import warm_python
from integration.cpu.arms import ARMS, record_of
from integration.cpu.launch import LaunchConfig, run
from integration.cpu.tiny_model import make_random_model
from integration.demo import task

STEPS = 3
LORA_RANK = 8


@dataclass(frozen=True)
class Row:
    """Runs that differ in the arm alone."""

    name: str
    strategy: str
    ranks: int
    lora_rank: int
    arms: tuple[str, ...]
    steps: int = STEPS


ROWS = (
    Row("fsdp-1", "fsdp", 1, 0, ("bf16", "stock-fp16", "fp16_patch")),
    Row("fsdp2-1", "fsdp2", 1, 0, ("bf16", "fp16_patch")),
    Row("fsdp-2", "fsdp", 2, 0, ("bf16", "fp16_patch")),
    Row("fsdp2-2", "fsdp2", 2, 0, ("bf16", "fp16_patch")),
    # verl's one working switch, so that what is left is the bf16 wire.
    Row("fsdp2-1-lora", "fsdp2", 1, LORA_RANK, ("bf16", "switched-fp16", "fp16_patch")),
)
SMOKE = (replace(ROWS[0], arms=("fp16_patch",), steps=1),)


def measure(row: Row, arm: str, model: Path, data: tuple[Path, Path], out: Path) -> dict[str, float]:
    """Run one arm; returns the mismatch over all its steps."""
    train, val = data
    config = LaunchConfig(
        model,
        train,
        val,
        Path(task.__file__),
        out,
        reward_name="share_of_digits",
        steps=row.steps,
        strategy=row.strategy,  # type: ignore[arg-type]
        ranks=row.ranks,
        lora_rank=row.lora_rank,
        python=warm_python(),
    )
    result = run(ARMS[arm].applied_to(config, out))
    if not result.ok:
        sys.exit(f"{row.name} {arm}: {result.reason or result.returncode}\n{result.tail()}")
    summary = load_run(record_of(out)).summary()
    return {**summary["mismatch"], "tokens": summary["tokens"], "wall_s": round(result.wall_seconds, 1)}


def chosen(names: Sequence[str]) -> tuple[Row, ...]:
    """Pick the rows whose name begins with one of these; all if there is none."""
    return tuple(row for row in ROWS if not names or row.name.startswith(tuple(names)))


def show(measured: dict[str, dict[str, dict[str, float]]], console: Console) -> None:
    table = Table("run", "arm", "tokens", "mean |d|", "max |d|", "mean |Σd|", "bf16 ÷ this arm")
    for row, arms in measured.items():
        for arm, facts in arms.items():
            ratio = arms["bf16"]["mean_abs"] / facts["mean_abs"] if "bf16" in arms else float("nan")
            cells = (f"{facts[name]:.2e}" for name in ("mean_abs", "max_abs", "seq_mean_abs"))
            table.add_row(row, arm, f"{facts['tokens']:.0f}", *cells, f"{ratio:.1f}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("rows", nargs="*", help="names, or beginnings of names, of rows")
    arguments = parser.parse_args(argv)
    with command.results_folder(arguments.out, smoke=arguments.smoke) as out:
        model = make_random_model(out / "model")
        data = task.write_dataset(out / "data", seed=arguments.seed)
        measured: dict[str, dict[str, dict[str, float]]] = {}
        for row in SMOKE if arguments.smoke else chosen(arguments.rows):
            for arm in row.arms:
                measured.setdefault(row.name, {})[arm] = measure(row, arm, model, data, out / row.name / arm)
                command.keep(out / "mismatch.json", measured)
                show(measured, Console())


if __name__ == "__main__":
    main()
