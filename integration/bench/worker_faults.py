"""Faults of a learner's ranks: each is planted between a checkpoint and the updates that go on from it."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fp16_patch import Plan
from integration.bench.command import OUT
from integration.bench.listening import heard
from integration.bench.ranks import PLAN, cpu_environment
from integration.bench.served import CALL
from integration.cpu.process import die_with_parent
from integration.cpu.tiny_model import make_random_model
from integration.cpu.warm.ranks import environments
from integration.cpu.warm.servers import IMPORTS, of_this_process

RANKS, UPDATES = 2, 3
WAIT_S = 240.0
"""Longer than the process group waits: a rank that has not ended by then hangs."""

GROUP_WAIT_S = 60.0
_ERROR = re.compile(r"[\w.]*(Error|Exception|Collapse)\b")
# Where in a library's source an error comes from, which differs from build to build.
_SOURCE, _SHOWN = re.compile(r"\[/[^]]*\] "), 120
GRACE_S = 5.0
"""After a rank has failed the others end by themselves, or are ended, as by torchrun."""

POLL_S = 0.1
HEALTHY = "trained on from the saved scale"


@dataclass(frozen=True)
class Fault:
    """What is planted, and where.

    Attributes:
        state: rank → what becomes of its state file.
        gradient: rank → factor of its loss, in the first update after the checkpoint.
        scale: of every rank's scaler after the first update, set past every check of ours.
        killed: a rank that dies in the first update.
        environment: rank → what its environment says besides.
    """

    state: Mapping[int, Callable[[Path], None]] | None = None
    gradient: Mapping[int, float] | None = None
    scale: float | None = None
    killed: int | None = None
    environment: Mapping[int, Mapping[str, str]] | None = None


CARRIED = {"FP16_PATCH_PLAN": Plan().to_json()}


def changed(section: str, **changes: Any) -> Callable[[Path], None]:
    """Change what a section of a state file says."""

    def change(path: Path) -> None:
        state = json.loads(path.read_text())
        state[section].update(changes)
        path.write_text(json.dumps(state))

    return change


saved = partial(changed, "scaler")
history = partial(changed, "history")


def text(content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(content)

    return write


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def removed(path: Path) -> None:
    path.unlink()


def on_all(change: Callable[[Path], None]) -> dict[int, Callable[[Path], None]]:
    return dict.fromkeys(range(RANKS), change)


FAULTS = {
    "nothing": Fault(),
    "scale NaN in every file": Fault(state=on_all(saved(scale=math.nan))),
    "scale infinite in every file": Fault(state=on_all(saved(scale=math.inf))),
    "scale 0 in every file": Fault(state=on_all(saved(scale=0.0))),
    "scale -4 in every file": Fault(state=on_all(saved(scale=-4.0))),
    "scale 1e300 in every file": Fault(state=on_all(saved(scale=1e300))),
    "scale a word in every file": Fault(state=on_all(saved(scale="high"))),
    "growth counter a list in every file": Fault(state=on_all(saved(_growth_tracker=[1]))),
    "scale NaN in rank 0's file": Fault(state={0: saved(scale=math.nan)}),
    "rank 0's file cut off": Fault(state={0: cut_off}),
    "rank 0's file a list": Fault(state={0: text("[]")}),
    "rank 0's file nested 100,000 deep": Fault(state={0: text("[" * 100_000)}),
    "rank 0's file without a version": Fault(state={0: text('{"scaler": {}, "history": {}}')}),
    "rank 0's file of a later version": Fault(state={0: text('{"version": 99}')}),
    "rank 0's file missing": Fault(state={0: removed}),
    "rank 1's file cut off": Fault(state={1: cut_off}),
    "ranks' files differ": Fault(state={1: saved(scale=4.0)}),
    "every file cut off": Fault(state=on_all(cut_off)),
    "every file missing": Fault(state=on_all(removed)),
    "history names a method": Fault(state=on_all(history(add=5))),
    "history counts NaN steps": Fault(state=on_all(history(attempted=math.nan))),
    "gradient NaN on rank 1": Fault(gradient={1: math.nan}),
    "loss infinite on rank 0": Fault(gradient={0: math.inf}),
    "overflow on rank 1": Fault(gradient={1: 2.0**40}),
    "scaler's scale NaN": Fault(scale=math.nan),
    "scaler's scale infinite": Fault(scale=math.inf),
    "scaler's scale 0": Fault(scale=0.0),
    "rank 1 killed": Fault(killed=1),
    "rank 1 told another mode than the plan carried to it": Fault(
        environment={0: CARRIED, 1: {**CARRIED, "FP16_PATCH": "bf16"}}
    ),
}


def planted(out: Path, name: str, seed: int) -> dict[str, Any]:
    """Plant one fault on ranks of their own."""
    model = out / "model"
    if not model.is_dir():
        make_random_model(model, layers=1)
    folder = out / name.replace(" ", "-").replace("'", "").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"fault": name, "model": str(model), "seed": seed}))
    started = time.monotonic()
    ranks = _start(folder, FAULTS[name])
    hung = _followed(ranks, started + WAIT_S)
    seconds = time.monotonic() - started
    return _judged([_found(folder, rank, hung[rank]) for rank in range(RANKS)], round(seconds, 1))


def _followed(ranks: list[subprocess.Popen[bytes]], until: float) -> list[bool]:
    """Wait for the ranks as torchrun does; returns which of them hung, though none had failed."""
    while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            until = min(until, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)
    failed = any(rank.poll() for rank in ranks)
    hung = [rank.poll() is None and not failed for rank in ranks]
    for rank in ranks:
        rank.kill()
    return hung


def _start(folder: Path, fault: Fault) -> list[subprocess.Popen[bytes]]:
    started = []
    for rank, of_rank in enumerate(environments(RANKS)):
        told = (fault.environment or {}).get(rank, {})
        environment = {**cpu_environment({**PLAN, **told}), **of_rank}
        python = of_this_process().server(IMPORTS, environment).interpreter
        with (folder / f"log_{rank}.txt").open("w") as log:
            command = [python, "-c", CALL, f"{__name__}:be_rank", str(folder)]
            started.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    preexec_fn=die_with_parent,
                )
            )
    return started


def _found(folder: Path, rank: int, hung: bool) -> dict[str, Any]:
    """Return what a rank has left, or what its log says of its end."""
    path = folder / f"rank_{rank}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    log = (folder / f"log_{rank}.txt").read_text(errors="replace")
    errors = [line for line in log.splitlines() if _ERROR.match(line)]
    return {"hung": hung, "error": errors[-1] if errors else "ended with the others", "said": []}


def _judged(ranks: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    trained = [rank for rank in ranks if "finite" in rank]
    alike = len({json.dumps(rank["scales"]) for rank in trained}) <= 1
    sound = all(rank["finite"] and rank["moved"] for rank in trained)
    words = [_word(rank) for rank in ranks]
    told = any(rank["said"] or rank.get("error") or rank.get("skipped") for rank in ranks)
    return {
        "ranks": words,
        "seconds": seconds,
        "reached_training": any(rank.get("hung") for rank in ranks) or not alike or not sound,
        "silent": not told and {*words} != {HEALTHY},
        "said": list(dict.fromkeys(line.replace(str(OUT), "out") for rank in ranks for line in rank["said"])),
    }


def _word(rank: dict[str, Any]) -> str:
    if rank.get("hung"):
        return "hung"
    if "finite" not in rank:
        return f"stopped: {_SOURCE.sub('', str(rank['error']))[:_SHOWN]}"
    if not rank["finite"]:
        return "parameters not finite"
    if not rank["moved"]:
        return "parameters never moved"
    if rank["skipped"]:
        return f"skipped {rank['skipped']:g}, trained on"
    return HEALTHY if rank["scales"][0] == rank["saved"] else "warned fresh start, trained on"


def be_rank(folder: str) -> None:
    """Train, save, plant, go on, in this process."""
    from datetime import timedelta

    import torch.distributed as dist
    import verl  # noqa: F401, it activates the plan

    request = json.loads((Path(folder) / "request.json").read_text())
    dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_WAIT_S))
    try:
        found = _trained(request, Path(folder))
    except Exception as stopped:
        found = {"error": f"{type(stopped).__name__}: {str(stopped).splitlines()[0]}", "said": []}
    rank = dist.get_rank()
    (Path(folder) / f"rank_{rank}.json").write_text(json.dumps(found))
    # Others may be gone: no barrier, and no destructor that waits for them.
    os._exit(int("error" in found))


def _trained(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, save and plant; then go on."""
    import torch.distributed as dist

    from integration.bench.verl_updates import Learner

    fault, rank, model = FAULTS[request["fault"]], dist.get_rank(), Path(request["model"])
    learner = Learner(model, 2 * UPDATES)
    for number in range(2):
        learner.update(request["seed"] + number)
    checkpoint = folder / "checkpoint"
    learner.engine.save_checkpoint(str(checkpoint), global_step=2)
    saved_scale = float(learner.engine.scaler.get_scale())
    dist.barrier()
    for path in checkpoint.glob(f"fp16_patch_*_rank_{rank}.json"):
        (fault.state or {}).get(rank, lambda _: None)(path)
    dist.barrier()
    with heard(logging.getLogger("fp16_patch")) as said:
        found = _gone_on(request, fault, checkpoint)
    return {**found, "saved": repr(saved_scale), "said": said}


def _gone_on(request: dict[str, Any], fault: Fault, checkpoint: Path) -> dict[str, Any]:
    """Go on from the checkpoint on a fresh learner, with the fault."""
    import torch.distributed as dist

    from integration.bench.verl_updates import Learner

    rank = dist.get_rank()
    fresh = Learner(Path(request["model"]), 2 * UPDATES)
    fresh.engine.load_checkpoint(str(checkpoint), del_local_after_load=False)
    before, scales, skipped = _parameters(fresh), [], 0.0
    for number in range(UPDATES):
        scales.append(float(fresh.engine.scaler.get_scale()))
        if number == 0 and fault.killed == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1 and fault.scale is not None:
            fresh.engine.scaler._scale.fill_(fault.scale)
        factor = (fault.gradient or {}).get(rank, 1.0) if number == 0 else 1.0
        skipped += fresh.update(request["seed"] + 2 + number, factor)["skipped"]
    after = _parameters(fresh)
    return {
        "scales": [repr(scale) for scale in scales],
        "skipped": skipped,
        "finite": bool(after.isfinite().all()),
        "moved": bool((after != before).any()),
    }


def _parameters(learner: Any) -> Any:
    import torch

    owned = (parameter for group in learner.engine.optimizer.param_groups for parameter in group["params"])
    local = [(one.to_local() if hasattr(one, "to_local") else one).detach().float().flatten() for one in owned]
    return torch.cat([*local, torch.zeros(1)]).clone()
