"""vLLM's side: what its `vllm.general_plugins` entry point runs in the server, EngineCore and worker processes."""

from __future__ import annotations

import multiprocessing

# vLLM's own names for the processes it starts, as multiprocessing knows them.
_KINDS = {"EngineCore": "engine_core", "VllmWorker": "sampler_worker"}


def register() -> None:
    """Activate the carried plan in this vLLM process and attest it to the process that started it."""
    from fp16_patch import autoload

    autoload.load()
    kind = next(
        (kind for name, kind in _KINDS.items() if multiprocessing.current_process().name.startswith(name)), None
    )
    if kind is not None and autoload.wanted():
        _attest(kind)


def _attest(kind: str) -> None:
    from fp16_patch import processes
    from fp16_patch.activation import attestation, ledger

    ledger().kind = kind
    processes.publish(attestation())
