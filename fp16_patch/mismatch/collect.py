"""From the driver to the disk without waiting: a Ray actor appends what each step measured.

Nothing here may touch training: a record that cannot be taken in time is dropped and counted, an error is one warning.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from fp16_patch.mismatch.record import MISMATCH, STEPS
from fp16_patch.mismatch.stats import MismatchStats

logger = logging.getLogger(__name__)

MAX_PENDING = 64
FLUSH_TIMEOUT_S = 10.0

Result = TypeVar("Result")


class Recorder:
    """Writes records under one directory; runs as a Ray actor on the driver's node."""

    def __init__(self, out_dir: str) -> None:
        self._out_dir = Path(out_dir)
        self._out_dir.mkdir(parents=True, exist_ok=True)

    def append(self, name: str, record: dict[str, Any]) -> None:
        with (self._out_dir / name).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    def write(self, name: str, document: dict[str, Any]) -> None:
        partial = self._out_dir / f"{name}.partial"
        partial.write_text(json.dumps(document, indent=1), encoding="utf-8")
        partial.replace(self._out_dir / name)


class Monitor:
    """The driver's end: gathers a step's statistics and hands them on, fire and forget.

    Args:
        out_dir: where `plan.json`, `ledger.json`, `mismatch.jsonl` and `steps.jsonl` go.
    """

    def __init__(self, out_dir: Path) -> None:
        self._stats = MismatchStats.empty()
        self._pending: list[Any] = []
        self._dropped = 0
        self._warned = False
        self._recorder = self._safely(lambda: _start_recorder(out_dir.absolute()))

    def observe(self, sampler: torch.Tensor, learner: torch.Tensor, mask: torch.Tensor) -> None:
        """Add tokens to the current step: log-probs of shape (sequences, tokens), mask 1 where a token was sampled."""
        self._safely(lambda: self._add(MismatchStats.from_log_probs(sampler, learner, mask)))

    def end_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Put the step's `mismatch/*` into the framework's metrics, and all of them on record."""
        self._safely(lambda: self._end_step(step, metrics))

    def write(self, name: str, document: dict[str, Any]) -> None:
        """Replace a whole JSON document."""
        self._safely(lambda: self._send("write", name, document))

    def flush(self) -> None:
        """Wait, a bounded time, for what was handed on."""
        self._safely(self._flush)

    def _add(self, stats: MismatchStats) -> None:
        self._stats = self._stats.merge(stats)

    def _end_step(self, step: int, metrics: dict[str, Any]) -> None:
        stats, self._stats = self._stats, MismatchStats.empty()
        when = {"step": step, "time": time.time()}
        measured = stats.metrics()
        if measured["mismatch/tokens"]:
            metrics.update(measured)
            self._send("append", MISMATCH, {**when, "metrics": measured, "state": stats.to_dict()})
        if self._dropped:
            metrics["mismatch/records_dropped"] = float(self._dropped)
        self._send("append", STEPS, {**when, "metrics": _plain_numbers(metrics)})

    def _send(self, method: str, name: str, record: dict[str, Any]) -> None:
        if self._recorder is None:
            return
        self._forget_done()
        if len(self._pending) >= MAX_PENDING:
            self._dropped += 1
            return
        self._pending.append(getattr(self._recorder, method).remote(name, record))

    def _forget_done(self) -> None:
        import ray

        if self._pending:
            done, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
            ray.get(done)  # so that a failed write is heard of

    def _flush(self) -> None:
        import ray

        if self._pending:
            ray.get(self._pending, timeout=FLUSH_TIMEOUT_S)
            self._pending = []

    def _safely(self, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except Exception as failure:
            if not self._warned:
                logger.warning("the mismatch monitor failed, training goes on without it: %s", failure)
            self._warned = True
            return None


def _start_recorder(out_dir: Path) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Recorder).options(num_cpus=0, scheduling_strategy=here).remote(str(out_dir))


def _plain_numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) or hasattr(value, "item")
    }
