"""Records the dtypes each process really used and whether our patches are live there, and judges both.

Every process keeps one `Ledger`. The driver reads all of them before it lets an optimizer step happen: a process that
does not answer, whose patches are not live, or that computed in another dtype than the plan's stops the run.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from fp16_patch.plan.dtypes import COMPUTE_OR_FP32, STAYS_FP32, torch_name
from fp16_patch.plan.errors import PrecisionFinding
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.fp32_weights import Kept

# role → quantity → torch's dtype names, sorted
Roles = dict[str, dict[str, list[str]]]
Record = dict[str, Any]
Process = tuple[str, int | None]


@dataclass
class Ledger:
    """Holds what this process saw.

    Attributes:
        kind: what the process is: `driver`, `task_runner`, `worker`, `server`, `engine_core`, `sampler_worker`,
            `sglang_server`, `sglang_scheduler`; `task_runner_v0` runs verl's V0 trainer, `rollouter` has its samples
            made, `supervised_driver` runs its SFT trainer with Ray.
        rank: its rank in the learner's process group, if it has one.
        training_granted: the driver has judged the whole job and allows optimizer steps.
        sampler_keeps: what the samplers of this job keep in another dtype than the plan's, as the driver told; None
            before, or if it does not know.
        held: of a sampler's worker, its `rank` within the sampler and a `digest` of the weights that its last sync
            left it with; None before the first.
        own_check: judges this process before its optimizer steps, see `preflight.check_itself`; None where a
            driver has seen all before.
    """

    kind: str = "process"
    rank: int | None = None
    training_granted: bool = False
    sampler_keeps: Kept | None = None
    problem: str | None = None
    held: dict[str, str] | None = None
    own_check: Callable[[], None] | None = None
    _seen: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    _keeps: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def note(self, role: str, quantity: str, *dtypes: object) -> bool:
        """Record that `role` used these dtypes (torch dtypes or their names) for `quantity`; True if one is new."""
        names = set(map(torch_name, dtypes))
        if not names:
            return False
        with self._lock:
            seen = self._seen.setdefault(role, {}).setdefault(quantity, set())
            new = not names <= seen
            seen |= names
        return new

    def note_kept(self, role: str, **ends: set[str]) -> bool:
        """Record by the ends of their names what a sampler keeps in another dtype than the plan's; True if one is new.

        Args:
            ends: of `parameters` and of `buffers`; an empty set says that there is none.
        """
        with self._lock:
            kept = self._keeps.setdefault(role, {})
            new = any(kind not in kept or not names <= kept[kind] for kind, names in ends.items())
            for kind, names in ends.items():
                kept.setdefault(kind, set()).update(names)
        return new

    @property
    def roles(self) -> Roles:
        return self._sorted(self._seen)

    def _sorted(self, noted: Mapping[str, Mapping[str, set[str]]]) -> Roles:
        with self._lock:
            return {role: {name: sorted(values) for name, values in row.items()} for role, row in noted.items()}

    def record(self, plan: Plan, patches: Mapping[str, str]) -> Record:
        """Return this process's attestation and dtypes, as plain data."""
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "kind": self.kind,
            "rank": self.rank,
            "mode": plan.mode,
            "patches": dict(patches),
            "problem": self.problem,
            "roles": self.roles,
            "keeps": self._sorted(self._keeps),
            "held": self.held,
        }


def missing_record(kind: str, problem: str, host: str = "?", pid: int | None = None) -> Record:
    """Make the record that stands for a process that left no attestation."""
    absent: dict[str, Any] = {"roles": {}, "keeps": {}, "patches": {}, "mode": None, "held": None}
    return {"host": host, "pid": pid, "kind": kind, "problem": problem, **absent}


_FIELDS: dict[str, tuple[type, ...]] = {
    "host": (str,),
    "pid": (int, type(None)),
    "kind": (str,),
    "mode": (str, type(None)),
    "patches": (dict,),
    "problem": (str, type(None)),
    "roles": (dict,),
    "keeps": (dict,),
}


def is_record(value: Any) -> bool:
    """Return whether something that was read is a process's record, as `Ledger.record` makes it."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key, ...), kind) for key, kind in _FIELDS.items()):
        return False
    rows = [*value["roles"].values(), *value["keeps"].values()]
    if not all(isinstance(row, dict) for row in rows):
        return False
    names = [seen for row in rows for seen in row.values()]
    return all(isinstance(seen, list) and all(isinstance(name, str) for name in seen) for seen in names)


def merged(records: Iterable[Record]) -> Roles:
    """Merge the dtypes of all records, by role and quantity."""
    together: dict[str, dict[str, set[str]]] = {}
    for record in records:
        for role, row in record["roles"].items():
            for quantity, dtypes in row.items():
                together.setdefault(role, {}).setdefault(quantity, set()).update(dtypes)
    return {role: {name: sorted(seen) for name, seen in row.items()} for role, row in together.items()}


def judge(
    records: Sequence[Record],
    plan: Plan,
    required: Mapping[str, Sequence[str]],
    owed: Callable[[str], Sequence[str]] = lambda kind: (),
    held_before: Mapping[Process, str] | None = None,
) -> list[PrecisionFinding]:
    """List everything that speaks against training: nothing when all processes attest and compute as planned.

    Args:
        records: one for every process that takes part, `missing_record` for one that did not answer.
        required: role → quantities somebody must have seen by now.
        owed: kind of process → patches that must be applied in it.
        held_before: host and pid → the digest of the weights that it held at an earlier time.
    """
    findings = [finding for record in records for finding in _attestation_findings(record, plan, owed)]
    findings += [finding for record in records for finding in _dtype_findings(record, plan)]
    findings += _unseen_findings(merged(records), required)
    return findings + _other_weights_findings(records, held_before or {})


def allowed_dtypes(plan: Plan, quantity: str) -> set[str]:
    """Return the dtypes a quantity may have under a plan that decides one."""
    compute = {str(plan.dtype)}
    if quantity in STAYS_FP32:
        return {"float32"}
    if quantity in COMPUTE_OR_FP32:
        return compute | {"float32"}
    return compute


def _attestation_findings(record: Record, plan: Plan, owed: Callable[[str], Sequence[str]]) -> list[PrecisionFinding]:
    problems = [record["problem"]] if record["problem"] else []
    if not problems and record["mode"] != plan.mode:
        problems.append(f"another plan: mode {record['mode']}")
    if not problems and (idle := [name for name in owed(record["kind"]) if record["patches"].get(name) != "applied"]):
        problems.append(f"patches not live: {', '.join(idle)}")
    where = record["host"], record["pid"], record["kind"]
    return [PrecisionFinding(*where, "attestation", problem, f"live, mode {plan.mode}") for problem in problems]


def _dtype_findings(record: Record, plan: Plan) -> list[PrecisionFinding]:
    findings = []
    for role, row in record["roles"].items():
        for quantity, seen in row.items():
            allowed = allowed_dtypes(plan, quantity)
            if not set(seen) <= allowed:
                wanted = " or ".join(sorted(allowed))
                findings.append(
                    PrecisionFinding(record["host"], record["pid"], role, quantity, ", ".join(seen), wanted)
                )
    return findings


def digests(records: Iterable[Record]) -> dict[Process, str]:
    """Return host and pid → the digest of the weights that a sampler's worker holds."""
    return {(each["host"], each["pid"]): each["held"]["digest"] for each in records if each.get("held")}


def _other_weights_findings(records: Sequence[Record], before: Mapping[Process, str]) -> list[PrecisionFinding]:
    """Name the samplers that a sync has left with other weights than the others that it reached.

    Of two that differ, the one is at fault that holds what it has held before.
    """
    findings = []
    for (role, label, _), group in _alike(records).items():
        holding = Counter(record["held"]["digest"] for record in group)
        if len(holding) == 1:
            continue
        (usual, most), (_, second), *_ = holding.most_common()
        unchanged = [each for each in group if before.get((each["host"], each["pid"])) == each["held"]["digest"]]
        odd = [record for record in group if record["held"]["digest"] != usual]
        at_fault = unchanged if 0 < len(unchanged) < len(group) else odd if second < most else group
        others = "the other sampler" if len(group) == 2 else f"{len(group) - 1} other samplers"
        seen = f"other weights than {others} got by sync {label}"
        findings += [
            PrecisionFinding(each["host"], each["pid"], role, "weights", seen, "the learner's, in every sampler")
            for each in at_fault
        ]
    return findings


def _alike(records: Sequence[Record]) -> dict[tuple[str, object, str], list[Record]]:
    """Group the samplers' workers that hold the same part of the same model, as of the same sync."""
    groups: dict[tuple[str, object, str], list[Record]] = {}
    for record in records:
        if record.get("held") and record.get("synced") is not None:
            role = next(iter(record["roles"]), "rollout")
            groups.setdefault((role, record["synced"], record["held"]["rank"]), []).append(record)
    return groups


def _unseen_findings(seen: Roles, required: Mapping[str, Sequence[str]]) -> list[PrecisionFinding]:
    return [
        PrecisionFinding("any", None, role, quantity, "never seen", "seen before the first optimizer step")
        for role, quantities in required.items()
        for quantity in quantities
        if quantity not in seen.get(role, {})
    ]
