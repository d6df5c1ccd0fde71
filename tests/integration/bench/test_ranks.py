"""Ranks of a bench: each has its plan, and a failure says what it was."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("torch")
pytest.importorskip("verl")

from integration.bench import ablation
from integration.bench.ranks import PLAN, STOCK, cpu_environment, on_ranks
from integration.bench.served import Served

THIS = "tests.integration.bench.test_ranks"


def plan_of_this_process(_request: Any) -> list[str]:
    """In a rank: the mode that is live."""
    from fp16_patch.runtime.activation import current_plan

    return [current_plan().mode, os.environ.get("FP16_PATCH_INIT_SCALE", "")]


def world_size(_request: Any) -> int:
    """In a rank: a collective of all."""
    import torch
    import torch.distributed as dist

    ones = torch.ones(1)
    dist.all_reduce(ones)
    return int(ones)


def second_rank_fails(_request: Any) -> None:
    """In a rank: the first waits for the second."""
    import torch.distributed as dist

    if dist.get_rank():
        raise ValueError("the second rank, on purpose")
    dist.barrier()


def plant_all(names: list[str]) -> list[str]:
    """In a rank: plant what is named, and import whatever it is planted in."""
    import wrapt

    sys.path.insert(0, str(ablation.PLANTS))
    os.environ |= {"PLANTED": ",".join(names), "PLANTED_LOG": os.devnull}
    register, modules = wrapt.register_post_import_hook, []

    def registered(hook: Any, module: str) -> None:
        modules.append(module)
        register(hook, module)

    wrapt.register_post_import_hook = registered
    planted = import_module("planted_in_verl")
    for module in modules:
        import_module(module)
    return sorted(planted.PLANTS)


def test_each_job_has_its_own_plan() -> None:
    scaled = {**PLAN, "FP16_PATCH_INIT_SCALE": "1024"}
    assert on_ranks(f"{THIS}:plan_of_this_process", None, scaled) == ["fp16", "1024"]
    assert on_ranks(f"{THIS}:plan_of_this_process", None, {**PLAN, "FP16_PATCH": "bf16"}) == ["bf16", ""]
    assert on_ranks(f"{THIS}:plan_of_this_process", None, STOCK) == ["off", ""]


def test_ranks_reach_each_other() -> None:
    assert on_ranks(f"{THIS}:world_size", None, STOCK, ranks=2) == 2


def test_a_rank_that_fails_ends_the_job_and_says_why() -> None:
    with pytest.raises(
        RuntimeError, match=r"second_rank_fails on 2 ranks:[\s\S]*ValueError: the second rank, on purpose"
    ):
        on_ranks(f"{THIS}:second_rank_fails", None, STOCK, ranks=2)
    assert on_ranks(f"{THIS}:world_size", None, STOCK) == 1


def test_a_process_that_ends_says_why(tmp_path: Path) -> None:
    served = Served("integration.bench.no_such_module:serve", (), cpu_environment({}), tmp_path / "log.txt")
    with pytest.raises(RuntimeError, match=r"no_such_module:serve ended:[\s\S]*ModuleNotFoundError"):
        served.ask("anything")
    served.close()


def test_everything_that_is_planted_has_a_place() -> None:
    source = (ablation.PLANTS / "planted_in_verl.py").read_text(encoding="utf-8")
    names = sorted(line.strip().rstrip(",") for line in source.partition("for plant in (")[2].partition(")")[0].split())
    assert on_ranks(f"{THIS}:plant_all", names, PLAN) == names
