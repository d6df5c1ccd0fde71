"""Fetches the records of vLLM's workers into the Ray actor that holds the engine, by `collective_rpc`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import attestation, ledger
from fp16_patch.runtime.ledger import Record, missing_record
from fp16_patch.samplers.holdings import role
from fp16_patch.vllm.engine import note_engine, watch_hidden_states

FETCH_TIMEOUT_S = 120.0
_POLL_S = 0.05

_fetches: set[Future[None]] = set()
_holds_engine = False


def request_records(engines: Sequence[Any]) -> None:
    """Have each engine's workers note what they hold, without waiting for it.

    Args:
        engines: handles of Ray actors with an `AsyncLLM` or an `LLM` in their attribute `llm`.
    """
    for engine in engines:
        engine.__ray_call__.remote(_fetch)


def refresh_records(engines: Sequence[Any]) -> None:
    """Have each engine fetch its workers' records now; an engine that cannot is found out by the preflight check."""
    import ray

    if not engines:
        return
    asked = [engine.__ray_call__.remote(_fetch) for engine in engines]
    ray.wait(asked, num_returns=len(asked), timeout=FETCH_TIMEOUT_S)
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    while time.monotonic() < deadline and not all(_fetched(ray, engine) for engine in engines):
        time.sleep(_POLL_S)


def _fetched(ray: Any, engine: Any) -> bool:
    try:
        return bool(ray.get(engine.__ray_call__.remote(_is_idle), timeout=FETCH_TIMEOUT_S))
    except Exception:
        return True  # the preflight check asks the same actor, and says what is wrong with it


def _fetch(actor: Any) -> None:
    global _holds_engine
    _holds_engine = True
    if not hasattr(actor.llm, "output_handler"):
        propagation.keep_children(actor.llm.collective_rpc(record_of_worker))
        return
    # Ray may call this on the actor's event loop or beside it; on it, waiting for the engine would be for ever.
    loop = actor.llm.output_handler.get_loop()
    fetch = asyncio.run_coroutine_threadsafe(_keep_workers_records(actor.llm), loop)
    _fetches.add(fetch)
    fetch.add_done_callback(_fetches.discard)


def _is_idle(actor: Any) -> bool:
    del actor
    return not _fetches


async def _keep_workers_records(llm: Any) -> None:
    try:
        records = await llm.collective_rpc(record_of_worker)
    except Exception as failure:
        records = [missing_record("sampler_worker", f"no attestation: {failure}")]
    propagation.keep_children(records)


def record_of_worker(worker: Any) -> Record:
    """Note what this worker holds, watch its next forward, and attest; it runs in vLLM's worker."""
    purpose = role()
    # A worker that is a Ray actor has its environment, and so its first name, from the server's.
    if not _holds_engine and ledger().kind != "engine_core":
        ledger().kind = "sampler_worker"
    note_engine(purpose, worker)
    if "activation" not in ledger().roles.get(purpose, {}):
        watch_hidden_states(purpose, worker)
    return attestation()
