"""Faults of a learner's ranks: each is planted between a checkpoint and the updates that go on from it."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.bench.listening import heard
from integration.bench.ranks import PLAN, cpu_environment
from integration.bench.served import CALL
from integration.cpu.process import die_with_parent
from integration.cpu.tiny_model import make_random_model
from integration.cpu.warm.servers import IMPORTS, of_this_process

RANKS, UPDATES = 2, 3
WAIT_S = 240.0
"""Longer than the process group waits: a rank that has not ended by then hangs."""

GROUP_WAIT_S = 60.0
PORTS = range(20000, 32000)
STOPPED, SKIPPED, FRESH, TRAINED, HUNG = "stopped", "skipped", "fresh start, warned", "trained on", "hung"


@dataclass(frozen=True)
class Fault:
    """What is planted, and where.

    Attributes:
        state: rank → what becomes of its state file.
        gradient: rank → factor of its loss, in the first update after the checkpoint.
        scale: of rank 0's and 1's scaler, set past every check of ours.
        killed: a rank that dies in the first update.
        environment: rank → what its environment says besides.
    """

    state: Mapping[int, Callable[[Path], None]] | None = None
    gradient: Mapping[int, float] | None = None
    scale: float | None = None
    killed: int | None = None
    environment: Mapping[int, Mapping[str, str]] | None = None


def saved(**changes: Any) -> Callable[[Path], None]:
    """Change what a state file says of the scaler."""

    def change(path: Path) -> None:
        state = json.loads(path.read_text())
        state["scaler"].update(changes)
        path.write_text(json.dumps(state))

    return change


def history(**changes: Any) -> Callable[[Path], None]:
    """Change what a state file says of the steps that were taken."""

    def change(path: Path) -> None:
        state = json.loads(path.read_text())
        state["history"].update(changes)
        path.write_text(json.dumps(state))

    return change


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


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
    "rank 1 told bf16": Fault(environment={1: {"FP16_PATCH": "bf16"}}),
    "rank 1 told nothing": Fault(environment={1: {"FP16_PATCH": "off"}}),
}


def planted(out: Path, name: str, seed: int) -> dict[str, Any]:
    """Plant one fault on ranks of their own."""
    model = out / "model"
    if not model.is_dir():
        make_random_model(model, layers=1)
    folder = out / name.replace(" ", "-").replace("'", "").replace(",", "")
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"fault": name, "model": str(model), "seed": seed}))
    started = time.monotonic()
    ranks = _start(folder, FAULTS[name])
    until = started + WAIT_S
    for rank in ranks:
        try:
            rank.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue
    hung = [rank.poll() is None for rank in ranks]
    for rank in ranks:
        rank.kill()
    seconds = time.monotonic() - started
    return _judged(FAULTS[name], [_found(folder, rank, hung[rank]) for rank in range(RANKS)], round(seconds, 1))


def _start(folder: Path, fault: Fault) -> list[subprocess.Popen[bytes]]:
    port = _port()
    started = []
    for rank in range(RANKS):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        told = (fault.environment or {}).get(rank, {})
        environment = {**cpu_environment({**PLAN, **told}), **of_rank, **where}
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


def _port() -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def _found(folder: Path, rank: int, hung: bool) -> dict[str, Any]:
    """Return what a rank has left, or what its log says of its end."""
    path = folder / f"rank_{rank}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    log = (folder / f"log_{rank}.txt").read_text(errors="replace").strip().splitlines()
    return {"hung": hung, "error": log[-1] if log and not hung else None, "said": []}


def _judged(fault: Fault, ranks: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    trained = [rank for rank in ranks if "finite" in rank]
    alike = len({json.dumps(rank["scales"]) for rank in trained}) <= 1
    sound = all(rank["finite"] and rank["moved"] for rank in trained)
    hung = any(rank.get("hung") for rank in ranks)
    words = [_word(rank) for rank in ranks]
    return {
        "ranks": words,
        "seconds": seconds,
        "reached_training": hung or not alike or not sound or (0 < len(trained) < len(ranks) and fault.killed is None),
        "silent": not _told(ranks) and fault != Fault(),
        "said": list(dict.fromkeys(line for rank in ranks for line in rank["said"])),
    }


def _told(ranks: list[dict[str, Any]]) -> bool:
    return any(rank["said"] or rank.get("error") or rank.get("skipped") for rank in ranks)


def _word(rank: dict[str, Any]) -> str:
    if rank.get("hung"):
        return HUNG
    if rank.get("error") or "finite" not in rank:
        return f"{STOPPED}: {rank.get('error')}"
    if not rank["finite"]:
        return "parameters not finite"
    if not rank["moved"]:
        return "parameters never moved"
    if rank["skipped"]:
        return f"{SKIPPED} {rank['skipped']:g}, {TRAINED}"
    return f"{TRAINED} from {'the saved' if rank['scales'][0] == rank['saved'] else 'another'} scale"


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
        found = {"error": f"{type(stopped).__name__}: {str(stopped).splitlines()[0][:200]}", "said": []}
    rank = dist.get_rank()
    (Path(folder) / f"rank_{rank}.json").write_text(json.dumps(found))
    # Others may be gone: no barrier, and no destructor that waits for them.
    os._exit(0)


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
    import torch
    import torch.distributed as dist

    from integration.bench.verl_updates import Learner

    rank = dist.get_rank()
    fresh = Learner(Path(request["model"]), 2 * UPDATES)
    fresh.engine.load_checkpoint(str(checkpoint), del_local_after_load=False)
    if fault.scale is not None:
        fresh.engine.scaler._scale = torch.full_like(fresh.engine.scaler._scale, fault.scale)
    before, scales, skipped = _parameters(fresh), [], 0.0
    for number in range(UPDATES):
        scales.append(float(fresh.engine.scaler.get_scale()))
        if number == 0 and fault.killed == rank:
            os.kill(os.getpid(), signal.SIGKILL)
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
