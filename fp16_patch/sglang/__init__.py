"""Attests in SGLang's schedulers, by SGLang's own plugins: they are the processes that hold the model."""

from __future__ import annotations

from multiprocessing import parent_process

from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import attestation, ledger, our_part

SCHEDULER = "sglang_scheduler"


def watch_this_process() -> None:
    """Watch the model of this process if it is a scheduler; a server is asked by the driver itself.

    SGLang calls its plugins in a server, where the framework's hook has said so before, and first of all in each
    scheduler that a server starts.
    """
    our_part("what watches a scheduler of SGLang").run(_watch)


def _watch() -> None:
    if ledger().kind != "process" or parent_process() is None:
        return
    from fp16_patch.sglang.scheduler import watch_model_runner

    ledger().kind = SCHEDULER
    watch_model_runner()
    propagation.publish(attestation())
