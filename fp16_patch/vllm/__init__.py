"""Attests in vLLM's processes: tells which one this is, and leaves its record with the process that started it."""

from __future__ import annotations

import os
from multiprocessing import current_process

from fp16_patch.plan.plan import KIND_ENV
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import attestation, ledger, our_part

# vLLM's own names for the processes it starts, as multiprocessing knows them.
_KINDS = {"EngineCore": "engine_core", "VllmWorker": "sampler_worker"}


def attest_this_process() -> None:
    """Leave an attestation if this is EngineCore or a worker; a server is asked by the driver itself."""
    our_part("what leaves the attestation of a process of vLLM").run(_attest)


def _attest() -> None:
    kind = next((kind for name, kind in _KINDS.items() if current_process().name.startswith(name)), None)
    if kind is not None:
        ledger().kind = kind
        propagation.publish(attestation())
    elif os.environ.get(KIND_ENV) == "server" and ledger().kind == "process":
        ledger().kind = "server"
        in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
        propagation.expect_children({} if in_process else {"engine_core": 1})
