"""Measure what an FP16 step costs beside a BF16 step, and what a loss scale that is too high costs.

    python -m integration.bench.step             # all of out/step.json
    python -m integration.bench.step passes      # one section: passes, overflows or wire

`passes`: verl's own FSDP engine in one process an arm, and the arms take turns, so that what slows the machine slows
all. Of the optimizer phase (unscale, norm, clip, step, adapt the scale) the passes over the gradients and the bytes of
them that are read and written are counted, operation by operation, and its time is given as a ratio to BF16's. The time
of a whole step is given where it says something of training: on a GPU, in `step_ratio`.
`overflows`: `integration.bench.retry`. `wire`: `integration.bench.wire`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from integration.bench import command, evidence, retry, wire
from integration.bench.ranks import MODULES, PLAN, cpu_environment
from integration.bench.served import Served, questions, say
from integration.cpu.tiny_model import make_random_model
from integration.cpu.warm.servers import IMPORTS, of_this_process

STOCK = {"FP16_PATCH_FUSED_STEP": "0"}
ARMS: Mapping[str, Mapping[str, str]] = {
    "bf16 stock": {"FP16_PATCH": "bf16", **STOCK},
    "fp16 stock": {"FP16_PATCH": "fp16", **STOCK},
    "bf16 ours": {"FP16_PATCH": "bf16"},
    "fp16 ours": {"FP16_PATCH": "fp16"},
}
# Name → width and depth of the model; it has about nine times the square of the one by the other parameters.
SIZES = {"10M": (384, 8), "100M": (1024, 11), "200M": (1280, 14), "500M": (1536, 24), "1500M": (2048, 40)}
FOR_A_GPU = ("500M", "1500M")
# A CPU is slow at FP16 products, of which the optimizer phase has none.
FEW_TOKENS = 2


@dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        models: name → width and depth, of those that this machine can hold.
        turns: updates of each arm that count.
        warm_up: updates before them.
        overflows, wire: sizes of the other sections.
    """

    models: Mapping[str, tuple[int, int]] = field(default_factory=lambda: SIZES)
    turns: int = 9
    warm_up: int = 2
    overflows: retry.Size = retry.BENCH.full
    wire: wire.Size = wire.BENCH.full


SMOKE = Size({"1M": (320, 1)}, turns=1, warm_up=0, overflows=retry.BENCH.smoke, wire=wire.BENCH.smoke)


def passes(out: Path, seed: int, size: Size) -> dict[str, Any]:
    """Count passes and bytes and take times, by size and arm.

    Returns:
        `passes_stock` and `passes_ours` of the smallest size, `sizes`, and `step_ratio` by device.
    """
    del seed
    device, names, tokens = _machine(size.models)
    phases = ("optimizer", "whole") if device else ("optimizer",)
    found = {name: _measured(size, size.models[name], tokens, phases, out) for name in names}
    smallest = found[names[0]]["arms"]
    whole = {name: of["ratios"]["whole"]["fp16 ours"] for name, of in found.items()} if device else {}
    return {
        "passes_stock": smallest["fp16 stock"]["passes"],
        "passes_ours": smallest["fp16 ours"]["passes"],
        "passes_stock_bf16": smallest["bf16 stock"]["passes"],
        "sizes": found,
        "step_ratio": {device: whole} if device else {},
    }


def _machine(models: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...], int]:
    """Return the GPU's name, if there is one; the sizes that fit; tokens of a sequence."""
    import torch

    if not torch.cuda.is_available():
        return None, tuple(name for name in models if name not in FOR_A_GPU), FEW_TOKENS
    fits = torch.cuda.get_device_properties(0).total_memory / (len(ARMS) * 20)
    return torch.cuda.get_device_name(0), tuple(name for name in models if _parameters(name) < fits), 2048


def _parameters(size: str) -> float:
    return int(size.removesuffix("M")) * 1e6


def _measured(size: Size, shape: tuple[int, int], tokens: int, phases: tuple[str, ...], out: Path) -> dict[str, Any]:
    """Let the arms take turns, each in a process of its own, and count the passes of one more update of each."""
    width, depth = shape
    updates = size.warm_up + size.turns
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fp16_patch_bench_", dir=out))
        model = make_random_model(Path(folder) / "model", hidden_size=width, layers=depth)
        arguments = (str(model), str(tokens), str(updates + 1))
        # All start before the first is asked.
        arms = {
            name: stack.enter_context(closing(_started(arguments, _environment(settings), out / f"{name}.log")))
            for name, settings in ARMS.items()
        }
        parameters = [arm.ask("parameters") for arm in arms.values()][0]
        turns = [{name: arm.ask("update") for name, arm in arms.items()} for _ in range(updates)][size.warm_up :]
        counted = {name: arm.ask("count") for name, arm in arms.items()}
    return {
        "parameters": parameters,
        "arms": {name: {**counted[name], "skipped": sum(turn[name]["skipped"] for turn in turns)} for name in ARMS},
        "ratios": {phase: _ratios(turns, phase) for phase in phases},
    }


def _ratios(turns: list[dict[str, dict[str, float]]], phase: str) -> dict[str, float]:
    """Divide each arm's seconds by those of BF16 as verl steps in the same turn; medians over the turns."""
    return {name: median(turn[name][phase] / turn["bf16 stock"][phase] for turn in turns) for name in ARMS}


def _started(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Served:
    import torch

    if torch.cuda.is_available():
        python = sys.executable  # CUDA, once a preloaded module has asked it anything, does not survive a fork
    else:
        python = str(of_this_process().server(IMPORTS, environment).interpreter)
    return Served("integration.bench.step:serve", arguments, environment, log, python)


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    import torch

    process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if torch.cuda.is_available():
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
        return {**kept, **process, **settings, MODULES: "fp16_patch.autoload"}
    return cpu_environment({**PLAN, **process, **settings})


def serve(model: str, tokens: str, updates: str) -> None:
    """Update a learner in this process each time it is asked to; the answer is the update's times, or its passes."""
    import torch
    import torch.distributed as dist

    from integration.bench.verl_updates import Learner

    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    learner = Learner(Path(model), int(updates), tokens=int(tokens))
    timed, number = _Timed(learner.engine), 0
    for asked in questions():
        if asked == "parameters":
            say(sum(parameter.numel() for parameter in learner.engine.module.parameters()))
            continue
        timed.counts = asked == "count"
        started = _now()
        metrics = learner.update(number)
        number, whole = number + 1, _now() - started
        times = {"whole": whole, "optimizer": timed.seconds, "skipped": metrics.get("skipped", 0.0)}
        say(timed.found if timed.counts else times)


class _Timed:
    """Wraps an engine's optimizer step, and takes its time or counts its passes."""

    def __init__(self, engine: Any) -> None:
        self._step, self._module = engine.optimizer_step, engine.module
        self.counts, self.seconds = False, 0.0
        self.found: dict[str, Any] = {}
        engine.optimizer_step = self.step

    def step(self) -> Any:
        if self.counts:
            return self._counted()
        started = _now()
        norm = self._step()
        self.seconds = _now() - started
        return norm

    def _counted(self) -> Any:
        from integration.bench.passes import GradientPasses

        with GradientPasses(self._module.parameters()) as counted:
            norm = self._step()
        self.found = {
            "passes": counted.passes,
            "bytes_per_parameter": counted.bytes_per_element,
            "operations": {name: sum(touched) / counted.elements for name, touched in counted.operations.items()},
        }
        return norm


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


SECTIONS: dict[str, Callable[[Path, int, Size], dict[str, Any]]] = {
    "passes": passes,
    "overflows": lambda out, seed, size: retry.BENCH.figures(out, seed, size.overflows),
    "wire": lambda out, seed, size: wire.BENCH.figures(out, seed, size.wire),
}


def show(found: Mapping[str, Any], console: Console) -> None:
    table = Table("parameters", "arm", "passes", "bytes", "optimizer ÷ bf16", "whole ÷ bf16", title="optimizer phase")
    for size in found.get("sizes", {}).values():
        for name, arm in size["arms"].items():
            ratios = [f"{of[name]:.2f}" for of in size["ratios"].values()]
            count = f"{size['parameters'] / 1e6:.0f} M"
            table.add_row(count, name, f"{arm['passes']:g}", f"{arm['bytes_per_parameter']:g}", *ratios)
    console.print(table)
    console.print({name: value for name, value in found.items() if name not in ("sizes", "made_of")})


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], help="only these")
    arguments = parser.parse_args(argv)
    with command.results_folder(arguments.out, smoke=arguments.smoke) as out:
        work, result = out / "step", out / "step.json"
        work.mkdir(exist_ok=True)
        for section in arguments.sections or SECTIONS:
            found = SECTIONS[section](work, arguments.seed, SMOKE if arguments.smoke else Size())
            kept: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {"made_of": {}}
            kept |= found
            kept["made_of"][section] = evidence.made_of(f"python -m integration.bench.step {section}", arguments.seed)
            command.keep(result, kept)
            show(kept, Console())


if __name__ == "__main__":
    main()
