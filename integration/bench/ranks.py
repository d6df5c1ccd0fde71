"""Call a function on the ranks of a learner, each a process that starts warm.

A rank has an environment of its own, imports verl in it, and with verl the plan that it names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from integration.bench.served import CALL, END_OF_LOG, called
from integration.cpu.launch import ENVIRONMENT
from integration.cpu.warm.servers import IMPORTS, of_this_process

ROOT = Path(__file__).parents[2]
MODULES = "VERL_USE_EXTERNAL_MODULES"
# The plan's mode, and how a process comes to it.
PLAN = {"FP16_PATCH": "fp16", MODULES: "verl_on_cpu,fp16_patch.autoload"}
STOCK = {MODULES: "verl_on_cpu"}


def on_ranks(work: str, request: Any, settings: Mapping[str, str], ranks: int = 1) -> Any:
    """Return what `work` returns for the request on the first of so many ranks.

    Args:
        work: `module:function`, called in each rank's process, where torch's process group stands.
        request: what JSON can hold, as the answer.
        settings: environment of the ranks, besides what verl needs on a CPU.

    Raises:
        RuntimeError: a rank failed; the end of what the ranks printed.
    """
    environment = cpu_environment(settings)
    interpreter = of_this_process().server(IMPORTS, environment).interpreter
    launch = [sys.executable, "-m", "integration.cpu.warm.ranks", str(interpreter), str(ranks)]
    with tempfile.TemporaryDirectory(prefix="fp16_patch_ranks_") as folder:
        asked, answered, log = (Path(folder) / name for name in ("request.json", "answer.json", "log.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        with log.open("w") as printed:
            ended = subprocess.run(
                [*launch, "-c", CALL, f"{__name__}:be_rank", work, str(asked), str(answered)],
                env=environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if ended.returncode or not answered.is_file():
            raise RuntimeError(f"{work} on {ranks} ranks:\n{log.read_text(errors='replace')[-END_OF_LOG:]}")
        return json.loads(answered.read_text(encoding="utf-8"))


def cpu_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the caller's environment without its plan, with what verl needs on a CPU and these settings."""
    ours = str(ROOT / "integration" / "cpu"), str(ROOT)
    path = os.pathsep.join(filter(None, [*ours, os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    return {**kept, **ENVIRONMENT, **settings, "PYTHONPATH": path}


def be_rank(work: str, asked: str, answered: str) -> None:
    """Do a rank's work in this process."""
    import torch.distributed as dist
    import verl  # noqa: F401, it activates the plan

    dist.init_process_group("gloo")
    found = called(work, json.loads(Path(asked).read_text(encoding="utf-8")))
    if dist.get_rank() == 0:
        Path(answered).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
