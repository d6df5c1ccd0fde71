"""The driver's question to every process of the job, and the leave to train that follows a good answer.

What is sent to other processes lives here, outside the framework folders: unpickling it must not activate a process
that failed to activate by itself.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fp16_patch import processes
from fp16_patch.activation import attestation, current_plan, ledger
from fp16_patch.errors import Finding, PrecisionError
from fp16_patch.ledger import Record, missing_record

ANSWER_TIMEOUT_S = 120.0
_UNCHECKED = "nobody checked this job: fp16_patch is not live in the trainer's process, or does not know this trainer"


def answer(actor: Any) -> list[Record]:
    """This process's record and those its child processes left, with one for each child that left none."""
    del actor  # what Ray passes to a function it calls inside an actor
    record = attestation()
    children = processes.children()
    absent = Counter(processes.expected_children()) - Counter(child["kind"] for child in children)
    problem = "no attestation: its plugin did not load (see the log of that process)"
    missing = [missing_record(kind, problem, record["host"]) for kind in absent.elements()]
    return [record, *children, *missing]


def allow_training(actor: Any) -> None:
    """Let this process take optimizer steps."""
    del actor
    ledger().cleared = True


def ask(actors: Sequence[tuple[str, Any]]) -> list[Record]:
    """The records of all processes behind these Ray actors.

    Args:
        actors: kind and handle of each; one that fails to answer becomes a record with a problem.
    """
    import ray

    # All are asked before the first answer is waited for.
    calls = [(kind, _call(handle)) for kind, handle in actors]
    records: list[Record] = []
    for kind, call in calls:
        try:
            if isinstance(call, Exception):
                raise call
            records += [_of_kind(record, kind) for record in ray.get(call, timeout=ANSWER_TIMEOUT_S)]
        except Exception as failure:
            records.append(missing_record(kind, f"no attestation: {_first_line(failure)}"))
    return records


def _call(handle: Any) -> Any:
    try:
        return handle.__ray_call__.remote(answer)
    except Exception as failure:  # the handle of a dead actor may fail at once
        return failure


def clear(actors: Sequence[tuple[str, Any]]) -> None:
    """Tell every process that the whole job was judged and may train."""
    import ray

    ray.get([handle.__ray_call__.remote(allow_training) for _, handle in actors], timeout=ANSWER_TIMEOUT_S)


def require_clearance() -> None:
    """Refuse an optimizer step in a Ray worker whose driver never judged the job.

    Raises:
        PrecisionError: the driver's own check is not live, so nobody vouches for the other processes.
    """
    if not current_plan().changes or ledger().cleared or not _inside_ray_actor():
        return
    where = socket.gethostname(), os.getpid(), ledger().kind
    raise PrecisionError([Finding(*where, "clearance", _UNCHECKED, "given before the first optimizer step")])


def _of_kind(record: Record, kind: str) -> Record:
    # A process that never activated does not know what it is for.
    return {**record, "kind": kind} if record["kind"] == "process" else record


def _inside_ray_actor() -> bool:
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().get_actor_id())


def _first_line(failure: Exception) -> str:
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[-1].strip() if lines else ''}"[:300]
