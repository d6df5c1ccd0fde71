"""Serves a learner's rank: reports what the rank measured to its node, without waiting for anything."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fp16_patch.mismatch.collection.aggregator import aggregator_here
from fp16_patch.mismatch.collection.background import Background
from fp16_patch.mismatch.collection.part import Part
from fp16_patch.mismatch.statistics.by_lag import Lags
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.plan.guard import Guard

logger = logging.getLogger(__name__)

MAX_WAITING = 64
# A process has to start for the first answer, and to import torch, which may take long from a network's disk.
ANSWER_TIMEOUT_S = 60.0
RESTART_TIMEOUT_S = 60.0
RESTART_POLL_S = 0.1


class Observer:
    """Reports from one process. A thread does what may take time: Ray, the aggregator's creation, the copy's end.

    What an aggregator that is behind cannot take is dropped; the count goes with the next report.

    Args:
        run: the name that the driver's ``Monitor`` has.
        world_size: how many ranks observe; the root waits for so many where the driver said nothing else.
    """

    def __init__(self, run: str, rank: int, world_size: int) -> None:
        self._run, self._rank, self._world_size = run, rank, world_size
        self._sender = uuid.uuid4().hex
        self._sent = 0
        self._told_dropped = 0
        self._aggregator: Any = None
        self._guard = Guard(logger, "the mismatch of this rank is not all observed, training goes on")
        self._reports = Background(self._deliver, MAX_WAITING, self._guard)

    @property
    def dropped(self) -> int:
        """Count the reports that did not arrive, so far."""
        return self._reports.dropped

    def observe(
        self, round: int, stats: MismatchStats, noise_floor: MismatchStats | None = None, by_lag: Lags | None = None
    ) -> None:
        """Report a batch, or one of its micro-batches; returns at once and never raises.

        Args:
            round: number of the batch in this attempt, as in ``Monitor.round``.
            stats: on any device; on an accelerator, made on its current stream.
            noise_floor: the learner against itself, where that was measured.
            by_lag: of the same tokens, those whose lag is known.
        """
        self._guard.run(
            lambda: self._reports.put(
                _Measured(
                    round,
                    HostCopy(stats),
                    None if noise_floor is None else HostCopy(noise_floor),
                    {lag: HostCopy(part) for lag, part in (by_lag or {}).items()},
                )
            )
        )

    def _deliver(self, measured: _Measured) -> None:
        dropped = self._reports.dropped
        part = Part(
            stats=measured.stats.wait(),
            noise_floor=None if measured.noise_floor is None else measured.noise_floor.wait(),
            ranks=frozenset([self._rank]),
            world_size=self._world_size,
            dropped=dropped - self._told_dropped,
            by_lag={lag: part.wait() for lag, part in measured.by_lag.items()},
        )
        self._sent += 1
        self._send(self._sent, measured.round, part.pack())
        self._told_dropped = dropped

    def _send(self, *report: Any) -> None:
        """Send a report, and again while the aggregator restarts.

        Raises:
            RayError: no answer, or no aggregator, in time.
        """
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        until = time.monotonic() + RESTART_TIMEOUT_S
        while True:
            try:
                self._aggregator = self._aggregator or aggregator_here(self._run)
                ray.get(self._aggregator.report.remote(self._sender, *report), timeout=ANSWER_TIMEOUT_S)
                return
            except (ActorDiedError, ActorUnavailableError) as failure:
                if time.monotonic() > until:
                    raise
                # A restarting one is kept: in the rank that created it, letting go of the handle would end it.
                if isinstance(failure, ActorDiedError):
                    self._aggregator = None
            time.sleep(RESTART_POLL_S)


class HostCopy:
    """Copies statistics to the host; an accelerator's are there when ``wait`` returns."""

    def __init__(self, stats: MismatchStats) -> None:
        self._stats = stats
        self._copied: Any = None
        device = stats.vector.device
        if device.type == "cpu":
            return
        # In the order of the stream, so behind what makes the statistics and before what reuses their memory.
        host = torch.empty_like(stats.vector, device="cpu", pin_memory=True)
        host.copy_(stats.vector, non_blocking=True)
        accelerator = getattr(torch, device.type)
        # Blocking: the waiting thread sleeps. By default it would spin, on a core that training has a use for.
        self._copied = accelerator.Event(blocking=True)
        self._copied.record(accelerator.current_stream(device))
        self._stats = MismatchStats(host)

    def wait(self) -> MismatchStats:
        if self._copied is not None:
            self._copied.synchronize()
        return self._stats


@dataclass(frozen=True)
class _Measured:
    round: int
    stats: HostCopy
    noise_floor: HostCopy | None
    by_lag: Mapping[int, HostCopy]
