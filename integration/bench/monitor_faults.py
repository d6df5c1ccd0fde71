"""Faults of the monitor's processes, files and sinks: each is planted in the middle of steps that a driver ends."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.collection import actors
from fp16_patch.mismatch.collection.monitor import Monitor
from fp16_patch.mismatch.collection.observer import Observer
from fp16_patch.mismatch.record.reading import MISMATCH, load_run
from fp16_patch.mismatch.statistics.summary import MismatchStats
from integration.bench.listening import heard

RANKS, TOKENS = 2, 4
BEFORE, AFTER = 2, 3
"""Steps before the one in which a fault is planted, and after it."""

TIMEOUT_S = 2.0
"""The plan's own, of a step's end."""

LONGEST_S = 3 * TIMEOUT_S
"""A step's end that takes longer has kept training waiting."""

PATIENCE_S = 60.0


class HangingSink:
    """A sink that never returns."""

    def __init__(self, run: str) -> None:
        pass

    def __call__(self, line: dict[str, Any]) -> None:
        time.sleep(3600)


class RaisingSink:
    """A sink that always raises."""

    def __init__(self, run: str) -> None:
        pass

    def __call__(self, line: dict[str, Any]) -> None:
        raise OSError("planted")


class Rank:
    """A learner's rank, in a process of its own."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._observer: Observer | None = None

    def observe(self, run: str, round: int, raising: bool = False) -> None:
        """Measure a batch; where it raises, the batch's tensors do not go together, as a fork's might not."""
        import torch

        self._observer = self._observer or Observer(run, self._rank, RANKS)
        sampler = torch.full((1, TOKENS), -1.0)
        if raising:
            self._observer.observe(round, "no statistics")  # type: ignore[arg-type]
            return
        stats = MismatchStats.from_log_probs(sampler, sampler + 0.5, torch.ones(1, TOKENS))
        self._observer.observe(round, stats)


@dataclass
class Job:
    """A driver, its ranks and where its record goes."""

    monitor: Monitor
    ranks: list[Any]
    folder: Path
    raising: bool = False

    def root(self) -> Any:
        import ray

        return ray.get_actor(actors.root_name(self.monitor.run), namespace=actors.NAMESPACE)


def kill_root(job: Job) -> None:
    import ray

    ray.kill(job.root(), no_restart=False)


def kill_root_for_good(job: Job) -> None:
    import ray

    ray.kill(job.root())


def kill_aggregator(job: Job) -> None:
    import ray

    for aggregator in actors.aggregators_of(job.monitor.run).values():
        ray.kill(aggregator, no_restart=False)


def kill_a_rank(job: Job) -> None:
    import ray

    ray.kill(job.ranks[0])
    job.ranks = [*_ranks(1), *job.ranks[1:]]


def full_disk(job: Job) -> None:
    path = job.folder / MISMATCH
    path.rename(path.with_suffix(".kept"))
    path.symlink_to("/dev/full")


def folder_gone(job: Job) -> None:
    shutil.rmtree(job.folder)


def folder_a_file(job: Job) -> None:
    shutil.rmtree(job.folder)
    job.folder.write_text("")


def report_that_raises(job: Job) -> None:
    job.raising = True


@dataclass(frozen=True)
class Fault:
    """A sink that the job has from the beginning, or what befalls it in a step."""

    befalls: Callable[[Job], None] | None = None
    sink: type | None = None


FAULTS = {
    "a sink hangs": Fault(sink=HangingSink),
    "a sink raises": Fault(sink=RaisingSink),
    "root killed": Fault(kill_root),
    "root killed for good": Fault(kill_root_for_good),
    "aggregator killed": Fault(kill_aggregator),
    "a rank's process killed and replaced": Fault(kill_a_rank),
    "a rank's report raises": Fault(report_that_raises),
    "the record's disk full": Fault(full_disk),
    "the record's folder removed": Fault(folder_gone),
    "a file in place of the record's folder": Fault(folder_a_file),
}


def planted(out: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Plant each fault in a job of its own; all in one local Ray."""
    if not names:
        return {}
    with _cluster():
        return {name: _planted(out / name.replace(" ", "-").replace("'", ""), FAULTS[name]) for name in names}


@contextmanager
def _cluster() -> Iterator[None]:
    import ray

    # Ray's sockets have long names, and results may lie deep.
    with tempfile.TemporaryDirectory(prefix="ray_") as folder:
        ray.init(num_cpus=2, include_dashboard=False, address="local", log_to_driver=False, _temp_dir=folder)
        try:
            yield
        finally:
            ray.shutdown()


def _planted(folder: Path, fault: Fault) -> dict[str, Any]:
    import ray

    folder.mkdir(parents=True)
    sinks = (f"{__name__}:{fault.sink.__name__}",) if fault.sink else ()
    log = folder.with_suffix(".log")
    with heard(logging.getLogger("fp16_patch")) as said:
        job = Job(Monitor(folder, actors.new_run(), TIMEOUT_S, sinks), _ranks(RANKS), folder)
        ray.get(job.root().history.remote(1), timeout=PATIENCE_S)  # its process starts
        waited = []
        for step in range(1, BEFORE + AFTER + 2):
            if step == BEFORE + 1 and fault.befalls is not None:
                fault.befalls(job)
            waited.append(_step(job, step))
        job.monitor.flush()
        ranks = job.ranks
    for rank in ranks:
        ray.kill(rank)
    log.write_text("\n".join(said))
    return _judged(fault, folder, waited, said)


def _ranks(count: int) -> list[Any]:
    import ray

    return [ray.remote(Rank).options(num_cpus=0).remote(rank) for rank in range(count)]


def _step(job: Job, step: int) -> tuple[float, dict[str, Any]]:
    """End a step; returns the seconds that its end took, and the metrics that the framework got."""
    import ray

    raising, job.raising = job.raising, False
    observing = [
        rank.observe.remote(job.monitor.run, job.monitor.round, raising and number == 0)
        for number, rank in enumerate(job.ranks)
    ]
    ray.get(observing, timeout=PATIENCE_S)
    metrics: dict[str, Any] = {}
    job.monitor.expect(TOKENS * RANKS)
    started = time.monotonic()
    job.monitor.end_step(step, metrics)
    return time.monotonic() - started, metrics


def _judged(fault: Fault, folder: Path, waited: list[tuple[float, dict[str, Any]]], said: list[str]) -> dict[str, Any]:
    coverage = [metrics.get("mismatch/coverage", 0.0) for _, metrics in waited]
    partial = [step for step, share in enumerate(coverage, start=1) if share < 1.0]
    longest = max(seconds for seconds, _ in waited)
    word = "every step measured" if not partial else f"steps {', '.join(map(str, partial))} in part"
    counted = any(metrics.get("mismatch/records_dropped") for _, metrics in waited)
    return {
        "ranks": [word] * RANKS,
        "seconds": round(longest, 2),
        "reached_training": longest > LONGEST_S or coverage[-1] < 1.0,
        # Without a figure that lacks and without a line that is lost there is nothing to tell.
        "silent": not (said or partial or counted or _whole(folder)),
        "said": list(dict.fromkeys(said)),
    }


def _whole(folder: Path) -> bool:
    """Return whether the record has every step, each of them with all its tokens."""
    try:
        run = load_run(folder)
    except (FileNotFoundError, ValueError):
        return False
    complete = [part.complete for part in run.coverage.values()]
    return len(complete) == BEFORE + AFTER + 1 and all(complete)
