"""Drives a run of any framework: opens its record, checks every process before the first update, records steps."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fp16_patch.mismatch.record.reading import LEDGER, PLAN
from fp16_patch.mismatch.run_monitor import RunMonitor
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.runtime.preflight import PreflightCheck

logger = logging.getLogger(__name__)

Driver = TypeVar("Driver", bound="FrameworkDriver")
Result = TypeVar("Result")

_SLOT = "_fp16_patch_driver"
_running: FrameworkDriver | None = None


class FrameworkDriver(ABC):
    """Keeps all that is ours of a run in the process that drives it: one instance, in one slot of the trainer.

    A framework subclasses it and says what its processes are, what they must have computed, and where its settings
    stand. Its hooks get the instance by `of`, or by `running` where the framework passes no trainer.

    Attributes:
        framework: the folder of `patches/` whose patches must be live.
        kind: what this process is called in the ledger.
        trainer: the framework's own object; its attributes are read when they are needed, not before.
        preflight: the check of all processes.
        monitor: writes the run's record; None before `begin`.
    """

    framework: ClassVar[str]
    kind: ClassVar[str] = "task_runner"

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.preflight = PreflightCheck(self.framework)
        self.monitor: RunMonitor | None = None

    @classmethod
    def of(cls: type[Driver], trainer: Any) -> Driver:
        """Return the trainer's driver, made at the first call."""
        driver: Driver | None = getattr(trainer, _SLOT, None)
        if driver is None:
            driver = cls(trainer)
            setattr(trainer, _SLOT, driver)
        return driver

    @classmethod
    def running(cls: type[Driver]) -> Driver | None:
        """Return the driver that began last in this process; None if none of this class did."""
        return _running if isinstance(_running, cls) else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the slot empty in a copy of the trainer, pickled or not: a record has one writer."""
        return type(None), ()

    def begin(self) -> None:
        """Reconcile plan and configuration, log the caveats, open the record. No worker has been started yet.

        Raises:
            PlanError: a setting is wrong, or cannot be had under the plan.
        """
        global _running
        ledger().kind = self.kind
        self.reconcile()
        log_caveats(self.caveats())
        self.monitor = RunMonitor(current_plan(), self._out_dir(), self.run_name())
        self.monitor.write(PLAN, self._plan_document())
        _running = self

    def checked_update(
        self, step: int, update: Callable[[], Result], roles_of: Callable[[Result], Iterable[str]]
    ) -> Result:
        """Ask every process, where that is due, and update only if all is as planned.

        Args:
            roles_of: takes the update's result, returns the roles that took part: from now on they have gradients.

        Raises:
            PrecisionError: a process or a dtype is not as planned.
        """
        if self.preflight.due(step):
            self.refresh_attestations()
            required = self.required_quantities(self.preflight.updated)
            self.preflight.run(step, self.actors(), required, self._write_ledger)
        result = update()
        self.preflight.updated.update(roles_of(result))
        return result

    @property
    def measures(self) -> bool:
        """Whether the mismatch is measured in this run."""
        return self.monitor is not None and self.monitor.measures

    def expect(self, tokens: int) -> None:
        """Expect the ranks to have observed so many more sampled tokens in this step."""
        if self.monitor is not None:
            self.monitor.expect(tokens)

    def end_step(self, step: int, metrics: dict[str, Any], *, observed: bool = True) -> None:
        """Put our metrics into the framework's, and the step on record.

        Args:
            observed: whether the ranks were to observe anything in this step.

        Raises:
            MismatchAlert: an alert fired, under `on_alert=stop`.
        """
        if self.monitor is not None:
            (self.monitor.end_step if observed else self.monitor.pass_step)(step, metrics)

    def flush(self) -> None:
        """Wait until what was recorded is on disk: the job's processes end without notice."""
        if self.monitor is not None:
            self.monitor.flush()

    @abstractmethod
    def reconcile(self) -> None:
        """Refine the plan by the run's own settings, check these under it, and write it into them.

        Raises:
            PlanError: a setting is wrong, or cannot be had under the plan.
        """

    @abstractmethod
    def refresh_attestations(self) -> None:
        """Have samplers bring up to date what they will attest."""

    @abstractmethod
    def actors(self) -> Sequence[tuple[str, Any]]:
        """Return kind and handle of every Ray actor that computes: learners' workers and samplers' servers."""

    @abstractmethod
    def required_quantities(self, updated: Collection[str]) -> Mapping[str, tuple[str, ...]]:
        """Return role → quantities that somebody must have seen by now.

        Args:
            updated: the roles that have taken part in an update.
        """

    @abstractmethod
    def caveats(self) -> list[str]:
        """Say what, besides precision, sampler and learner differ in, or why nothing is measured."""

    @abstractmethod
    def model(self) -> str | None:
        """Return the policy's name or path, as configured."""

    @abstractmethod
    def sampler(self) -> str | None:
        """Return what the policy samples with, by its name in a configuration; None if we do not know it."""

    @abstractmethod
    def checkpoints(self) -> Path:
        """Return the folder beside whose checkpoints the record lies, if the plan names no other."""

    def run_name(self) -> str | None:
        """Return the name by which the ranks report; None for a new one, which the framework carries to them."""
        return None

    def _write_ledger(self, answers: dict[str, Any]) -> None:
        if self.monitor is not None:
            self.monitor.write(LEDGER, answers)

    def _out_dir(self) -> Path:
        return Path(current_plan().out_dir or self.checkpoints() / "fp16_patch")

    def _plan_document(self) -> dict[str, Any]:
        plan = current_plan()
        facts = {"dtype": plan.dtype, "caveats": self.caveats(), "model": self.model(), "sampler": self.sampler()}
        return {"framework": self.framework, **asdict(plan), **facts}


def log_caveats(caveats: Iterable[str]) -> None:
    """Log each as a warning."""
    for caveat in caveats:
        logger.warning("the mismatch of this run: %s", caveat)
