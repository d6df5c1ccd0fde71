"""verl's SFT trainer as its command line starts it, on gloo ranks, looked at from outside; leaves one JSON of facts.

Started by `tests.ranks`; see `test_supervised.py`. Nothing here looks at fp16_patch: the same facts are taken from
stock verl and from verl under a plan.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

PROGRAM = "verl.trainer.sft_trainer"
seen: dict[str, set[str]] = {"activation": set(), "master": set(), "gradient": set()}


def note(quantity: str, tensors: Iterable[torch.Tensor]) -> None:
    seen[quantity].update(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)


def note_layer(module: Any, _inputs: Any, output: Any) -> None:
    if isinstance(module, torch.nn.Linear):
        note("activation", [output])


def note_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    note("master", parameters)
    note("gradient", [each.grad for each in parameters])


def main() -> None:
    out, *overrides = sys.argv[1:]
    register_module_forward_hook(note_layer)
    register_optimizer_step_pre_hook(note_step)
    sys.argv = [PROGRAM, *overrides]
    error, began = None, False
    try:
        runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)
    except Exception as problem:
        error, began = f"{type(problem).__name__}: {problem}", dist.is_initialized()
    if os.environ["RANK"] == "0":
        dtypes = {quantity: sorted(names) for quantity, names in seen.items()}
        Path(out, "facts.json").write_text(json.dumps({**dtypes, "error": error, "began": began}))


if __name__ == "__main__":
    main()
