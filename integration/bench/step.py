"""What an FP16 step costs beside a BF16 step, and what a loss scale that is too high costs.

    python -m integration.bench.step             # all of out/step.json
    python -m integration.bench.step passes      # one section: passes, overflows or wire

`passes`: verl's own FSDP engine in one process an arm, and the arms take turns, so that what slows the machine slows
all. Of the optimizer phase (unscale, norm, clip, step, adapt the scale) the passes over the gradients and the bytes of
them that are read and written are counted, operation by operation, and its time is given as a ratio to BF16's. The time
of a whole step is given where it says something of training: on a GPU, in `step_ratio`.
`overflows`: `integration.bench.retry`. `wire`: `integration.bench.wire`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from integration.bench import evidence, retry, wire
from integration.bench.verl_learner import ROOT
from integration.cpu.launch import ENVIRONMENT
from integration.cpu.tiny_model import make_random_model

STOCK = {"FP16_PATCH_FUSED_STEP": "0"}
ARMS: Mapping[str, Mapping[str, str]] = {
    "bf16 stock": {"FP16_PATCH": "bf16", **STOCK},
    "fp16 stock": {"FP16_PATCH": "fp16", **STOCK},
    "bf16 ours": {"FP16_PATCH": "bf16"},
    "fp16 ours": {"FP16_PATCH": "fp16"},
}
# Name → width and depth of the model; it has about nine times the square of the one by the other parameters.
SIZES = {"10M": (384, 8), "100M": (1024, 11), "200M": (1280, 14), "500M": (1536, 24), "1500M": (2048, 40)}
ON_A_CPU = ("10M", "100M", "200M")
TURNS, WARM_UP = 9, 2
# A CPU is slow at FP16 products, of which the optimizer phase has none.
FEW_TOKENS = 2
_ANSWER = "answer "


class Arm:
    """One arm's learner, in a process of its own, that updates when it is told to."""

    def __init__(self, settings: Mapping[str, str], model: Path, tokens: int, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "integration.bench.step", "--serve", str(model), str(tokens)]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                env=_environment(settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.facts = self._answer()

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
                return answer
        raise RuntimeError(f"verl's engine ended:\n{self._log.read_text()[-3000:]}")


def passes(out: Path, seed: int) -> dict[str, Any]:
    """Size → arm → passes, bytes and times; of the smallest, `passes_stock`, `passes_ours`; `step_ratio` by device."""
    del seed
    device, sizes, tokens = _machine()
    phases = ("optimizer", "whole") if device else ("optimizer",)
    found = {size: _measured(size, tokens, phases, out) for size in sizes}
    smallest = found[sizes[0]]["arms"]
    whole = {size: of["ratios"]["whole"]["fp16 ours"] for size, of in found.items()} if device else {}
    return {
        "passes_stock": smallest["fp16 stock"]["passes"],
        "passes_ours": smallest["fp16 ours"]["passes"],
        "passes_stock_bf16": smallest["bf16 stock"]["passes"],
        "sizes": found,
        "step_ratio": {device: whole} if device else {},
    }


def _machine() -> tuple[str | None, tuple[str, ...], int]:
    """Name of the GPU, if there is one; the sizes that fit; tokens of a sequence."""
    import torch

    if not torch.cuda.is_available():
        return None, ON_A_CPU, FEW_TOKENS
    fits = torch.cuda.get_device_properties(0).total_memory / (len(ARMS) * 20)
    sizes = tuple(size for size in SIZES if int(size.removesuffix("M")) * 1e6 < fits)
    return torch.cuda.get_device_name(0), sizes, 2048


def _measured(size: str, tokens: int, phases: tuple[str, ...], out: Path) -> dict[str, Any]:
    width, depth = SIZES[size]
    with tempfile.TemporaryDirectory(prefix="fp16_patch_bench_", dir=out) as folder:
        model = make_random_model(Path(folder) / "model", hidden_size=width, layers=depth)
        arms = {name: Arm(settings, model, tokens, out / f"{name}.log") for name, settings in ARMS.items()}
        turns = [{name: arm.ask("update") for name, arm in arms.items()} for _ in range(WARM_UP + TURNS)][WARM_UP:]
        counted = {name: arm.ask("count") for name, arm in arms.items()}
        parameters = next(iter(arms.values())).facts["parameters"]
        for arm in arms.values():
            arm.close()
    return {
        "parameters": parameters,
        "arms": {name: {**counted[name], "skipped": sum(turn[name]["skipped"] for turn in turns)} for name in ARMS},
        "ratios": {phase: _ratios(turns, phase) for phase in phases},
    }


def _ratios(turns: list[dict[str, dict[str, float]]], phase: str) -> dict[str, float]:
    """Arm → median, over the turns, of its seconds ÷ those of BF16 as verl steps in the same turn."""
    return {name: median(turn[name][phase] / turn["bf16 stock"][phase] for turn in turns) for name in ARMS}


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    import torch

    kept = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if torch.cuda.is_available():
        return {**kept, **process, **settings, "VERL_USE_EXTERNAL_MODULES": "fp16_patch.autoload"}
    path = os.pathsep.join([str(ROOT / "integration" / "cpu"), str(ROOT)])
    modules = {"VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,fp16_patch.autoload", "PYTHONPATH": path}
    return {**kept, **ENVIRONMENT, **process, **settings, **modules}


def serve(model: Path, tokens: int) -> None:
    """In an arm's process: one update for each line that comes in, its times on a line that goes out."""
    import torch
    import torch.distributed as dist

    from integration.bench.verl_updates import Learner

    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    learner = Learner(model, WARM_UP + TURNS + 1, tokens=tokens)
    timed = _Timed(learner.engine)
    _say({"parameters": sum(parameter.numel() for parameter in learner.engine.module.parameters())})
    for number, line in enumerate(sys.stdin):
        timed.counts = line.strip() == "count"
        started = _now()
        metrics = learner.update(number)
        whole = _now() - started
        _say(
            timed.found
            if timed.counts
            else {"whole": whole, "optimizer": timed.seconds, "skipped": metrics.get("skipped", 0.0)}
        )


class _Timed:
    """Stands before an engine's optimizer step, and takes its time or counts its passes."""

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


def _say(answer: dict[str, Any]) -> None:
    print(_ANSWER + json.dumps(answer), flush=True)


SECTIONS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "passes": passes,
    "overflows": retry.measure,
    "wire": wire.measure,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(Path(arguments.serve[0]), int(arguments.serve[1]))
        return
    out: Path = arguments.out.resolve()
    (out / "step").mkdir(parents=True, exist_ok=True)
    result = out / "step.json"
    for section in arguments.sections or SECTIONS:
        found = SECTIONS[section](out / "step", arguments.seed)
        kept: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {"made_of": {}}
        kept |= found
        kept["made_of"][section] = evidence.made_of(f"python -m integration.bench.step {section}", arguments.seed)
        result.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        show(kept, Console())


if __name__ == "__main__":
    main()
