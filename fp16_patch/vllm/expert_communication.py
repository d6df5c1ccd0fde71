"""How vLLM's experts on several GPUs exchange tokens: which ways know bfloat16 only, and where one is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator

from fp16_patch.patching.sources import Installed, Sources
from fp16_patch.plan.dtypes import BFLOAT16
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import Plan

ARGUMENT = "all2all_backend"
# How older vLLM is asked for it.
VARIABLE = "VLLM_ALL2ALL_BACKEND"

# Their kernels add up the experts' results in bfloat16, and assert that they get it.
BF16_ONLY = (
    "deepep_high_throughput",
    "deepep_low_latency",
    "deepep_v2",
    "moonep",
    "nixl_ep",
)


def expert_communication_conflict(key: str, backend: object, plan: Plan) -> Conflict | None:
    """Say why this way of exchanging tokens is refused; None if it is not."""
    if plan.dtype == BFLOAT16.torch or str(backend) not in BF16_ONLY:
        return None
    reason = f"its kernels exchange the experts' tokens in bfloat16 only, and stop at {plan.dtype}"
    return Conflict(key, backend, reason, "use allgather_reducescatter, or FP16_PATCH=bf16")


def environment_conflicts(plan: Plan, vllm: Sources | None = None) -> Iterator[Conflict]:
    """Yield the one that this process's environment asks for, if vLLM reads it.

    Args:
        vllm: its sources; by default the installed one's.
    """
    conflict = expert_communication_conflict(VARIABLE, os.environ.get(VARIABLE), plan)
    if conflict is not None and VARIABLE in ((vllm or Installed()).read("vllm.envs") or ""):
        yield conflict
