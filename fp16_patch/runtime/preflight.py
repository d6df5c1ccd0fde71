"""Asks every process of a job before its first update, and grants training if all is as planned.

The functions that run in other processes live here, outside the framework folders: unpickling them must not activate a
process that failed to activate by itself.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from fp16_patch.plan.errors import PrecisionError, PrecisionFinding
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import attestation, current_plan, ledger, owed_patches
from fp16_patch.runtime.fp32_weights import Kept, kept_by_samplers
from fp16_patch.runtime.ledger import Process, Record, digests, judge, merged, missing_record

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 120.0
_UNCHECKED = (
    "nobody checked this job: fp16_patch is not live in the trainer's process, which `fp16-patch run --` before the "
    "command mends, or does not know this trainer"
)


class PreflightCheck:
    """Checks all processes of a run before its first update, and again now and then.

    Attributes:
        updated: roles whose engines have taken part in an update; the driver's hooks add to it.
    """

    def __init__(self, framework: str) -> None:
        self.framework = framework
        self.updated: set[str] = set()
        self._first_step: int | None = None
        self._last_step: int | None = None
        self._asked_with: frozenset[str] = frozenset()
        self._held: dict[Process, str] = {}

    def due(self, step: int) -> bool:
        """Return whether to check now: at first, after an engine's first update, and each `ledger_every` steps."""
        if self._first_step is None or self._asked_with != self.updated:
            return True
        return step != self._last_step and (step - self._first_step) % current_plan().ledger_every == 0

    def run(
        self,
        step: int,
        actors: Sequence[tuple[str, Any]],
        required: Mapping[str, Sequence[str]],
        publish: Callable[[dict[str, Any]], None],
    ) -> None:
        """Ask every process what it is and what it computed in; grant training once, if all answers are as planned.

        Args:
            actors: kind and handle of every Ray actor that computes.
            required: role → quantities somebody must have seen by now.
            publish: called with the answers, whatever they say.

        Raises:
            PrecisionError: with host, pid, role, quantity, what was seen and what was wanted.
        """
        plan = current_plan()
        records = [record for record in (propagation.driver_record(), attestation()) if record] + ask(actors)
        publish({"processes": records, "roles": merged(records)})
        if plan.overrides_dtype and (findings := judge(records, plan, required, self._owed, self._held)):
            raise PrecisionError(findings)
        self._held = digests(records)
        if self._first_step is None:
            if plan.overrides_dtype:
                grant_training(actors, kept_by_samplers(records))
            logger.info("%d processes attest mode %s: %s", len(records), plan.mode, _summary(records))
        self._first_step = step if self._first_step is None else self._first_step
        self._last_step, self._asked_with = step, frozenset(self.updated)

    def _owed(self, kind: str) -> tuple[str, ...]:
        return owed_patches(self.framework, kind)


def collect_attestations(actor: Any) -> list[Record]:
    """Return this process's record and those its child processes left, with one for each child that left none.

    Args:
        actor: what Ray passes to a function that it calls inside one. A sampler's server may have the label of the
            last sync, by the name that verl gives it.
    """
    record = attestation()
    children = propagation.children()
    absent = Counter(propagation.expected_children()) - Counter(child["kind"] for child in children)
    problem = "no attestation: its plugin did not load (see the log of that process)"
    missing = [missing_record(kind, problem, record["host"]) for kind in absent.elements()]
    synced = getattr(actor, "global_steps", None)
    return [{**each, "synced": synced} for each in (record, *children, *missing)]


def allow_training(actor: Any, sampler_keeps: Kept | None) -> None:
    """Allow this process to take optimizer steps, and tell it which weights the samplers keep in other dtypes."""
    del actor
    ledger().training_granted, ledger().sampler_keeps = True, sampler_keeps


def ask(actors: Sequence[tuple[str, Any]]) -> list[Record]:
    """Ask these Ray actors for the records of all processes behind them.

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
        return handle.__ray_call__.remote(collect_attestations)
    except Exception as failure:  # the handle of a dead actor may fail at once
        return failure


def grant_training(actors: Sequence[tuple[str, Any]], sampler_keeps: Kept | None) -> None:
    """Tell every process that the whole job was judged and may train, and what its samplers keep."""
    import ray

    allow = partial(allow_training, sampler_keeps=sampler_keeps)
    ray.get([handle.__ray_call__.remote(allow) for _, handle in actors], timeout=ANSWER_TIMEOUT_S)


def require_training_grant() -> None:
    """Refuse an optimizer step in a Ray worker whose driver never judged the job, and where the own check fails.

    Raises:
        PrecisionError: the driver's own check is not live, so nobody vouches for the other processes; or this process
            does not compute as planned.
    """
    if not current_plan().overrides_dtype:
        return
    if not ledger().training_granted and inside_ray_actor():
        where = socket.gethostname(), os.getpid(), ledger().kind
        finding = PrecisionFinding(*where, "clearance", _UNCHECKED, "given before the first optimizer step")
        raise PrecisionError([finding])
    if (check := ledger().own_check) is not None:
        check()


def check_itself(actor: Any, framework: str, required: Mapping[str, Sequence[str]]) -> None:
    """Have this process judge itself from now on, where no pass before the first update shows what it computes in.

    Args:
        actor: what Ray passes to a function that it calls inside one; None outside.
        framework: whose patches must be live.
        required: role → quantities that this process must have seen once it has computed a batch.
    """
    del actor
    ledger().own_check = _OwnCheck(framework, required)


def require_other_ranks() -> None:
    """Refuse to compute a batch of a job without a driver unless every rank of it is under the same plan.

    It is asked before the first batch: under a plan that is computed once more than without, to measure it.

    Raises:
        PrecisionError: with the ranks that fp16_patch did not reach.
    """
    if current_plan().overrides_dtype and isinstance(check := ledger().own_check, _OwnCheck):
        check.meet_other_ranks()


class _OwnCheck:
    """Judges this process before its first optimizer step, and each `ledger_every` steps.

    By then the batch has been computed, forward and backward.
    """

    def __init__(self, framework: str, required: Mapping[str, Sequence[str]]) -> None:
        self.framework, self.required = framework, required
        self._steps, self._met = 0, False

    def __call__(self) -> None:
        """Judge before a step, if that is due.

        Raises:
            PrecisionError: with host, pid, role, quantity, what was seen and what was wanted.
        """
        if self._steps % current_plan().ledger_every == 0:
            self._judge()
        self._steps += 1

    def meet_other_ranks(self) -> None:
        """Tell the other ranks of the job this one's plan, once, and wait for theirs.

        Raises:
            PrecisionError: with the ranks that do not tell in time, or have another.
        """
        if not self._met and (findings := _other_ranks_findings(current_plan())):
            raise PrecisionError(findings)
        self._met = True

    def _judge(self) -> None:
        plan, noted = current_plan(), ledger()
        noted.kind = "worker"
        record = attestation()
        findings = judge([record], plan, self.required, partial(owed_patches, self.framework))
        if findings:
            raise PrecisionError(findings)
        if self._steps == 0 and not noted.rank:
            logger.info("rank %s attests mode %s: %s", noted.rank or 0, plan.mode, _summary([record]))


def _other_ranks_findings(plan: Plan) -> list[PrecisionFinding]:
    """Tell the other ranks of a job without a driver that this one is live, and name those that do not tell in time."""
    from torch import distributed

    if inside_ray_actor() or not distributed.is_initialized():
        return []
    from fp16_patch.runtime.torch_private import job_store

    store, told = job_store(), replace(plan, out_dir=None).to_json()
    keys = [f"fp16_patch/plan of rank {rank}" for rank in range(distributed.get_world_size())]
    store.set(keys[distributed.get_rank()], told)
    # Not a collective: a rank without us would take part in the next one, or never come.
    with suppress(RuntimeError):
        store.wait(keys, timedelta(seconds=ANSWER_TIMEOUT_S))
    answers = [store.get(key).decode() if store.check([key]) else None for key in keys]
    absent = "no attestation: fp16_patch is not live there; start every node with `fp16-patch run --`"
    return [
        PrecisionFinding(
            f"rank {rank}",
            None,
            "worker",
            "attestation",
            "another plan" if answer else absent,
            f"live, mode {plan.mode}",
        )
        for rank, answer in enumerate(answers)
        if answer != told
    ]


def _of_kind(record: Record, kind: str) -> Record:
    # A process that never activated does not know what it is for.
    return {**record, "kind": kind} if record["kind"] == "process" else record


def inside_ray_actor() -> bool:
    """Return whether this process is a Ray actor: a driver elsewhere decides about it then."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().get_actor_id())


def _first_line(failure: Exception) -> str:
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[-1].strip() if lines else ''}"[:300]


def _summary(records: Sequence[Record]) -> str:
    return "; ".join(
        f"{role}: " + ", ".join(f"{quantity}={'|'.join(seen)}" for quantity, seen in row.items())
        for role, row in merged(records).items()
    )
