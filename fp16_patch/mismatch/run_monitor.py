"""Runs the monitor as the plan wants it: what is measured when, which alerts there are, and what an alert does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.collection.monitor import Monitor
from fp16_patch.mismatch.diagnosis.alerts import Alert, Alerts
from fp16_patch.mismatch.diagnosis.judgement import Thresholds
from fp16_patch.plan.errors import MismatchAlert
from fp16_patch.plan.plan import Plan

logger = logging.getLogger(__name__)

SINKS = ("fp16_patch.mismatch.collection.prometheus:PrometheusSink",)


class RunMonitor:
    """Is the monitor as a driver sees it. Nothing here reaches training but an alert under `on_alert=stop`.

    Args:
        out_dir: where the record goes.
        run: the name by which the ranks report, see `Monitor`.
    """

    def __init__(self, plan: Plan, out_dir: Path, run: str | None = None) -> None:
        self._plan = plan
        self._alerts = Alerts(Thresholds.of_plan(asdict(plan)))
        self._monitor = Monitor(out_dir, run, plan.monitor_timeout_s, SINKS, self._judge)
        self._fired: list[Alert] = []
        self._tokens = 0
        self._which = ""
        self.write, self.flush = self._monitor.write, self._monitor.flush

    @property
    def run(self) -> str:
        """Return the name by which the ranks report."""
        return self._monitor.run

    @property
    def measures(self) -> bool:
        return self._plan.monitor and bool(self.run)

    @property
    def order(self) -> tuple[str, int, bool]:
        """Return what a rank is told to observe: run, round, and whether to measure the learner against itself."""
        every = self._plan.noise_floor_every
        return self.run, self._monitor.round, every > 0 and self._monitor.round % every == 0

    def expect(self, tokens: int) -> None:
        """Expect so many more sampled tokens in the open round."""
        self._tokens += tokens
        self._monitor.expect(self._tokens)

    def end_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Put the step's figures into the framework's metrics and on record.

        Raises:
            MismatchAlert: an alert fired, under `on_alert=stop`.
        """
        self._fired, self._tokens = [], 0
        self._monitor.end_step(step, metrics)
        for alert in self._fired:
            logger.warning("sampler and learner%s: %s", self._which, alert.message)
        if self._fired and self._plan.on_alert == "stop":
            self.flush()
            raise MismatchAlert(step, [alert.message for alert in self._fired])

    def pass_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Put a step on record in which no rank was to observe; the round stays open."""
        self._tokens = 0
        self._monitor.pass_step(step, metrics)

    def _judge(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        self._which = ", where both hold the same weights" if "mismatch/lag_known" in metrics else ""
        standing = self._alerts.update(step, dict(metrics))
        self._fired = list(self._alerts.new)
        return {"alerts": [alert.as_dict() for alert in standing]}
