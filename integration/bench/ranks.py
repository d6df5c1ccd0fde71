"""Call a function on the ranks of a learner, each a process forked from one that has imported torch and verl.

Importing verl takes longer than most of what a bench asks of its engine. A rank has an environment of its own, and the
plan that it names is activated in it, after the import.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from integration.bench.served import END_OF_LOG, Served, questions, say
from integration.cpu.launch import ENVIRONMENT

ROOT = Path(__file__).parents[2]
MODULES = "VERL_USE_EXTERNAL_MODULES"
# The plan's mode, and how a process comes to it.
PLAN = {"FP16_PATCH": "fp16", MODULES: "verl_on_cpu,fp16_patch.autoload"}
STOCK = {MODULES: "verl_on_cpu"}
PRELOADED = ("verl.workers.engine_workers", "verl.workers.engine.fsdp.transformer_impl", "torch.nested", "peft")


def on_ranks(work: str, request: Any, settings: Mapping[str, str], ranks: int = 1) -> Any:
    """Return what `work` returns for the request on the first of so many ranks.

    Args:
        work: `module:function`, called in each rank's process, where torch's process group stands.
        request: what JSON can hold, as the answer.
        settings: environment of the ranks, besides what verl needs on a CPU.

    Raises:
        RuntimeError: a rank failed; the end of what the ranks printed.
    """
    with tempfile.TemporaryDirectory(prefix="fp16_patch_ranks_") as folder:
        asked, answered, log = (Path(folder) / name for name in ("request.json", "answer.json", "log.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        job = {"work": work, "environment": cpu_environment(settings), "ranks": ranks, "folder": folder}
        if not _parent().ask(job) or not answered.is_file():
            raise RuntimeError(f"{work} on {ranks} ranks:\n{log.read_text(errors='replace')[-END_OF_LOG:]}")
        return json.loads(answered.read_text(encoding="utf-8"))


def cpu_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the caller's environment without its plan, with what verl needs on a CPU and these settings."""
    path = os.pathsep.join([str(ROOT / "integration" / "cpu"), str(ROOT)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    return {**kept, **ENVIRONMENT, **settings, "PYTHONPATH": path}


@cache
def _parent() -> Served:
    handle, log = tempfile.mkstemp(prefix="fp16_patch_ranks_", suffix=".log")
    os.close(handle)
    started = Served("integration.bench.ranks:serve", (), cpu_environment(STOCK), Path(log))
    atexit.register(Path(log).unlink, missing_ok=True)
    atexit.register(started.close)
    return started


def _fork_ranks(job: dict[str, Any]) -> bool:
    """Fork the ranks and wait for them; whether all of them came to their end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"], "MASTER_ADDR": "127.0.0.1"}
    running: set[int] = set()
    for rank in range(job["ranks"]):
        own = {**group, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        child = os.fork()
        if not child:
            _be_rank(job, {**job["environment"], **{name: str(value) for name, value in own.items()}})
        running.add(child)
    good = True
    while running:
        child, status = os.wait()
        running.discard(child)
        if status:
            good = False
            # They would wait for the one that failed.
            for other in running:
                os.kill(other, signal.SIGKILL)
    return good


def _be_rank(job: dict[str, Any], environment: dict[str, str]) -> None:
    """Do a rank's work in a process just forked, and end it."""
    code = 1
    try:
        log = os.open(Path(job["folder"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        os.environ.clear()
        os.environ.update(environment)
        _work(job)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(job: dict[str, Any]) -> None:
    import torch.distributed as dist

    for module in os.environ[MODULES].split(","):
        import_module(module)
    module, _, function = job["work"].partition(":")
    dist.init_process_group("gloo")
    asked, answered = (Path(job["folder"]) / name for name in ("request.json", "answer.json"))
    found = getattr(import_module(module), function)(json.loads(asked.read_text(encoding="utf-8")))
    if dist.get_rank() == 0:
        answered.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def serve() -> None:
    """Fork ranks for each job that is asked for, in the process that has imported verl."""
    for module in PRELOADED:
        import_module(module)
    for job in questions():
        say(_fork_ranks(job))
