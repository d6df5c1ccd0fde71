"""Faults of the monitor's processes, files and sinks: each is planted in the middle of steps that a driver ends."""

from __future__ import annotations

import logging
import re
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
BEFORE, AFTER = 2, 4
"""Steps before the one in which a fault is planted, and after it."""

COMPUTING_S = 0.5
"""What a step takes besides its end: a tenth of a real one."""

TIMEOUT_S = 2.0
"""The plan's own, of a step's end."""

LONGEST_S = 3 * TIMEOUT_S
"""A step's end that takes longer has kept training waiting."""

PATIENCE_S = 60.0
# Names of jobs and actors, and what a death's report says besides.
_AS_EVERY_RUN = re.compile(r"\b[0-9a-f]{8,}(-[0-9a-f]+)?\b|(?<=finishing this task\.).*", re.DOTALL)


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

    _remove(folder)
    folder.mkdir(parents=True)
    sinks = (f"{__name__}:{fault.sink.__name__}",) if fault.sink else ()
    log = folder.with_suffix(".log")
    with heard(logging.getLogger("fp16_patch")) as said:
        job = Job(Monitor(folder, actors.new_run(), TIMEOUT_S, sinks), _ranks(RANKS), folder)
        ray.get(job.root().history.remote(1), timeout=PATIENCE_S)  # its process starts
        _warm_up(job)
        waited = []
        for step in range(1, BEFORE + AFTER + 2):
            if step == BEFORE + 1 and fault.befalls is not None:
                fault.befalls(job)
            waited.append(_step(job, step))
            time.sleep(COMPUTING_S)
        job.monitor.flush()
        ranks = job.ranks
    for rank in ranks:
        ray.kill(rank)
    log.write_text("\n".join(said))
    return _judged(folder, waited, said)


def _warm_up(job: Job) -> None:
    """End steps, numbered below 1, until one is measured whole: its processes have to start."""
    until = time.monotonic() + PATIENCE_S
    step = -1000
    while _step(job, step)[1].get("mismatch/coverage") != 1.0:
        if time.monotonic() > until:
            raise RuntimeError("no step was measured whole")
        step += 1
        time.sleep(COMPUTING_S)


def _remove(folder: Path) -> None:
    """Remove what an earlier run of the bench has left, which may be a file."""
    if folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


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


def _judged(folder: Path, waited: list[tuple[float, dict[str, Any]]], said: list[str]) -> dict[str, Any]:
    measured = [metrics.get("mismatch/coverage") == 1.0 for _, metrics in waited]
    recorded = _recorded(folder)
    lost = [step for step, whole in enumerate(measured, start=1) if not whole]
    unrecorded = [step for step in range(1, len(waited) + 1) if step not in recorded]
    words = [_steps("not measured whole in time", lost), _steps("not whole on record", unrecorded)]
    longest = max(seconds for seconds, _ in waited)
    counted = any(metrics.get("mismatch/records_dropped") for _, metrics in waited)
    return {
        "ranks": ["; ".join(filter(None, words)) or "every step measured and recorded"] * RANKS,
        "seconds": round(longest, 2),
        "reached_training": longest > LONGEST_S or not measured[-1],
        # A step that lacks tokens has a coverage below 1 in its metrics.
        "silent": bool(unrecorded) and not (said or lost or counted),
        "said": list(dict.fromkeys(_AS_EVERY_RUN.sub("…", line) for line in said)),
    }


def _steps(what: str, steps: Sequence[int]) -> str:
    return f"{what}: {', '.join(map(str, steps))}" if steps else ""


def _recorded(folder: Path) -> set[int]:
    """Return the steps that the record has with all their tokens."""
    try:
        coverage = load_run(folder).coverage
    except (OSError, ValueError):
        return set()
    return {step for step, part in coverage.items() if part.complete}
