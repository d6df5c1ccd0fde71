"""Every error a user can meet, each with what was seen, what was wanted and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fp16_patch.untrusted.text import printable, quoted


class Fp16PatchError(Exception):
    """Base of all errors raised by fp16_patch."""


@dataclass(frozen=True)
class Conflict:
    """A setting that cannot be had under the plan: its key, its value, why not, and the change that helps."""

    key: str
    value: object
    reason: str
    fix: str

    def __str__(self) -> str:
        # Values, and reasons with a library's words in them, may be a file's or a stranger's.
        return f"{quoted(self.key)}={quoted(self.value)}: {printable(self.reason)}. Fix: {printable(self.fix)}"


class PlanError(Fp16PatchError, ValueError):
    """The plan, or a framework's configuration under it, is not possible.

    Args:
        conflicts: at least one conflict; the message lists all of them, so that one run shows every fix.
    """

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__("\n".join(str(conflict) for conflict in self.conflicts))

    def __reduce__(self) -> tuple[type[PlanError], tuple[tuple[Conflict, ...]]]:
        return type(self), (self.conflicts,)


class PatchError(Fp16PatchError):
    """The installed framework is not the code a patch was written for."""


class SourceError(Fp16PatchError):
    """A framework's source cannot be had, or is not what the command asked for."""


@dataclass(frozen=True)
class PrecisionFinding:
    """One reason not to train: a process or a quantity that is not as the plan wants it."""

    host: str
    pid: int | None
    role: str
    quantity: str
    seen: str
    wanted: str

    def row(self) -> tuple[str, str, str, str, str, str]:
        pid = "-" if self.pid is None else str(self.pid)
        return self.host, pid, self.role, self.quantity, self.seen, self.wanted


class PrecisionError(Fp16PatchError):
    """A process is not attested, or a dtype differs from the plan. Raised before the optimizer step it would spoil."""

    _HEADER = ("host", "pid", "role", "quantity", "seen", "wanted")

    def __init__(self, findings: Sequence[PrecisionFinding]) -> None:
        self.findings = tuple(findings)
        super().__init__(self._message())

    def __reduce__(self) -> tuple[type[PrecisionError], tuple[tuple[PrecisionFinding, ...]]]:
        return type(self), (self.findings,)

    def _message(self) -> str:
        rows = [self._HEADER, *(finding.row() for finding in self.findings)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self._HEADER))]
        table = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "training stopped: not every process computes as planned\n" + "\n".join(table)


class LossScaleCollapse(Fp16PatchError):
    """Overflows do not end: the scale is at its floor, or too many optimizer steps in a row were skipped.

    Args:
        role: the engine whose gradients overflow, `actor` or `critic`.
        step: optimizer steps this engine has attempted, counted from 1.
        reason: which limit was reached.
        culprits: rank → names of the first parameters whose gradient on that rank is not finite.
        suspects: rank → where its last overflow that was looked into began.
    """

    def __init__(
        self, role: str, step: int, reason: str, culprits: dict[int, list[str]], suspects: dict[int, str] | None = None
    ) -> None:
        self.role, self.step, self.reason, self.culprits = role, step, reason, culprits
        self.suspects = suspects or {}
        where = "; ".join(f"rank {rank}: {', '.join(names)}" for rank, names in sorted(culprits.items()) if names)
        super().__init__(
            f"{role}: loss scale collapsed at optimizer step {step}: {reason}. "
            f"Non-finite gradients in {where or 'no parameter by the time of the check'}. {self._beginning()}"
            "Look at the loss and the inputs of that step first; if the model needs a wider range than FP16 has, "
            "run with FP16_PATCH=bf16."
        )

    def __reduce__(self) -> tuple[type[LossScaleCollapse], tuple[Any, ...]]:
        return type(self), (self.role, self.step, self.reason, self.culprits, self.suspects)

    def _beginning(self) -> str:
        places = "; ".join(f"rank {rank}: {place}" for rank, place in sorted(self.suspects.items()))
        return f"The overflow began in {places}. " if places else ""


class MismatchAlert(Fp16PatchError):
    """Sampler and learner have drifted apart further than a threshold allows, under `on_alert=stop`.

    Args:
        step: the trainer's step at which the first of the alerts fired.
        alerts: one sentence each, with metric, value and threshold.
    """

    def __init__(self, step: int, alerts: Sequence[str]) -> None:
        self.step, self.alerts = step, tuple(alerts)
        listed = "\n  ".join(self.alerts)
        super().__init__(
            f"training stopped at step {step}, as on_alert=stop asks:\n  {listed}\n"
            "`fp16-patch report` on the run's record says what kind of gap it is; on_alert=log goes on all the same."
        )

    def __reduce__(self) -> tuple[type[MismatchAlert], tuple[int, tuple[str, ...]]]:
        return type(self), (self.step, self.alerts)


class RankLeftAlone(Fp16PatchError):
    """Scoring for the noise floor failed on this rank, and another rank is held up in the same forward pass.

    Args:
        failure: what happened here.
        waited: seconds that this rank has waited for the others.
    """

    def __init__(self, failure: Exception, waited: float) -> None:
        self.failure, self.waited = failure, waited
        super().__init__(
            f"{type(failure).__name__} in the noise floor's forward pass on this rank: {failure}. After {waited:g} s "
            "another rank still waits for this one in it, so the run ends instead of hanging. "
            "Fix: mend that, or set noise_floor_every=0"
        )

    def __reduce__(self) -> tuple[type[RankLeftAlone], tuple[Exception, float]]:
        return type(self), (self.failure, self.waited)


# Tracebacks show the name that users import and catch.
for _public in (Fp16PatchError, PlanError, PatchError, PrecisionError, LossScaleCollapse, MismatchAlert):
    _public.__module__ = "fp16_patch"
