"""The monitor's processes in a real Ray: complete steps, and accidents that cost no more than they must."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ray = pytest.importorskip("ray")

from fp16_patch.mismatch.collection import actors
from fp16_patch.mismatch.collection.monitor import Monitor
from fp16_patch.mismatch.collection.patience import Patience
from fp16_patch.mismatch.record.reading import MISMATCH, STEPS
from fp16_patch.mismatch.statistics.summary import MismatchStats

PATIENT_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    if ray.is_initialized():
        pytest.skip("this process is connected to another Ray")
    ray.init(num_cpus=2, include_dashboard=False, address="local", log_to_driver=False)
    yield
    ray.shutdown()


def start_ranks(count: int) -> list[Any]:
    """Learner's ranks, each a process that may belong to several runs."""

    class Rank:
        def __init__(self, rank: int, world_size: int) -> None:
            self._rank, self._world_size, self._observers = rank, world_size, {}

        def observe(self, run: str, round: int, tokens: int) -> None:
            from fp16_patch.mismatch.collection.observer import Observer

            sampler = torch.full((1, tokens), -1.0)
            stats = MismatchStats.from_log_probs(sampler, sampler + 0.5, torch.ones(1, tokens))
            if run not in self._observers:
                self._observers[run] = Observer(run, self._rank, self._world_size)
            self._observers[run].observe(round, stats)

    return [ray.remote(Rank).options(num_cpus=0).remote(rank, count) for rank in range(count)]


class Training:
    """A driver whose steps have 4 tokens of each rank."""

    def __init__(self, out_dir: Path, ranks: list[Any], run: str | None = None) -> None:
        self.out_dir, self.ranks = out_dir, ranks
        self.monitor = Monitor(out_dir, run, timeout_s=PATIENT_S)
        # The attempt has begun: what ranks report before is forgotten with the attempt before. A job starts its workers
        # in the meantime.
        begun = self.monitor._pending
        assert len(ray.wait(begun, num_returns=len(begun), timeout=PATIENT_S)[0]) == len(begun) == 1

    def observe(self, ranks: list[Any] | None = None, round: int | None = None) -> None:
        number = self.monitor.round if round is None else round
        for rank in self.ranks if ranks is None else ranks:
            ray.get(rank.observe.remote(self.monitor.run, number, 4))

    def end_step(self, step: int, timeout_s: float = PATIENT_S) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        self.monitor._timeout_s = timeout_s
        # No step here waits less for what happened in the one before.
        self.monitor._patience_with_root, self.monitor._patience_with_ranks = Patience(), Patience()
        self.monitor.expect(4 * len(self.ranks))
        self.monitor.end_step(step, metrics)
        return metrics

    def step(self, step: int) -> dict[str, Any]:
        self.observe()
        return self.end_step(step)

    def record(self, name: str = MISMATCH) -> dict[int, Any]:
        """The last line of each step on disk."""
        self.monitor._patience_with_root = Patience()
        self.monitor.flush()
        path = self.out_dir / name
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {line["step"]: line for line in lines}

    def coverage(self) -> dict[int, tuple[int, int, bool]]:
        seen = {step: line["coverage"] for step, line in self.record().items()}
        return {step: (row["tokens"], row["ranks"], row["complete"]) for step, row in seen.items()}


@pytest.fixture(scope="module")
def ranks(cluster: None) -> list[Any]:
    return start_ranks(2)


@pytest.fixture(scope="module")
def training(ranks: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Shared: processes are slow to start. Every test takes steps of its own numbers."""
    return Training(tmp_path_factory.mktemp("shared"), ranks)


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENT_S
    while not holds():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def kill(handle: Any) -> None:
    """The process dies, and Ray starts another for the actor."""
    ray.kill(handle, no_restart=False)


def aggregator_of(run: str) -> Any:
    (handle,) = actors.aggregators_of(run).values()
    return handle


def test_every_step_is_what_all_ranks_measured(training: Training) -> None:
    for step in (10, 11, 12):
        metrics = training.step(step)
        assert (metrics["mismatch/tokens"], metrics["mismatch/coverage"]) == (8.0, 1.0)
        assert metrics["mismatch/mean_abs"] == pytest.approx(0.5)
    assert {step: training.coverage()[step] for step in (10, 11, 12)} == dict.fromkeys((10, 11, 12), (8, 2, True))


def test_a_rank_that_is_late_replaces_the_line_of_its_step(training: Training) -> None:
    first, late = training.ranks
    training.step(19)
    round = training.monitor.round
    training.observe([first])
    assert training.end_step(20, timeout_s=0.5)["mismatch/coverage"] == 0.5
    assert training.coverage()[20] == (4, 1, False)
    training.observe([late], round)
    eventually(lambda: training.coverage()[20] == (8, 2, True))


def test_a_root_killed_between_steps_costs_nothing(training: Training) -> None:
    before = training.step(30) and training.record()
    kill(training.monitor._root)
    assert training.step(31)["mismatch/coverage"] == 1.0
    after = training.record()
    assert after == before | {31: after[31]}
    assert 31 in training.record(STEPS)


def test_a_root_killed_within_a_step_costs_at_most_the_steps_figures(training: Training) -> None:
    training.observe()
    kill(training.monitor._root)
    started = time.monotonic()
    metrics = training.end_step(40, timeout_s=0.2)
    # There may be one left to answer in time; else nobody waits for it.
    assert metrics.get("mismatch/coverage") in (0.0, 1.0)
    assert time.monotonic() - started < 5.0
    eventually(lambda: training.coverage().get(40) == (8, 2, True))
    assert training.step(41)["mismatch/coverage"] == 1.0
    assert training.record()[30]["coverage"]["complete"]


def test_an_aggregator_killed_within_a_step_marks_the_step_and_no_other(training: Training) -> None:
    training.step(50)
    aggregator = aggregator_of(training.monitor.run)
    training.observe()
    number = training.monitor.round
    eventually(lambda: bool(ray.get(aggregator.take.remote({number: None}))))
    kill(aggregator)
    metrics = training.end_step(51, timeout_s=0.5)
    assert metrics["mismatch/coverage"] < 1.0
    assert training.step(52)["mismatch/coverage"] == 1.0
    coverage = training.coverage()
    assert [coverage[step][2] for step in (50, 51, 52)] == [True, False, True]


def test_an_aggregator_whose_creator_died_is_created_by_another_rank(ranks: list[Any], tmp_path: Path) -> None:
    # A run of its own, with ranks of its own for the first step.
    (mortal,) = start_ranks(1)
    training = Training(tmp_path, [mortal])
    assert training.step(1)["mismatch/coverage"] == 1.0
    ray.kill(mortal)
    # A report that the dying one still takes is lost with it, as in the test before.
    eventually(lambda: not actors.aggregators_of(training.monitor.run))
    training.ranks = ranks
    assert training.step(2)["mismatch/coverage"] == 1.0
    assert training.coverage() == {1: (4, 1, True), 2: (8, 2, True)}


def test_two_runs_in_one_cluster_do_not_mix_and_a_new_attempt_of_one_begins_anew(
    training: Training, tmp_path: Path
) -> None:
    run = f"{actors.job_run()}-other"
    other = Training(tmp_path / "other", training.ranks[:1], run)
    other.observe()
    training.observe()
    assert other.end_step(1)["mismatch/tokens"] == 4.0
    assert training.end_step(60)["mismatch/tokens"] == 8.0
    assert other.coverage() == {1: (4, 1, True)}

    resumed = Training(tmp_path / "other", training.ranks, run)
    assert resumed.monitor.round == 0
    assert resumed.step(2)["mismatch/tokens"] == 8.0
    lines = resumed.record()
    assert [lines[step]["attempt"] for step in (1, 2)] == [other.monitor.attempt, resumed.monitor.attempt]


def test_who_watches_the_run_finds_the_root_by_its_name(training: Training) -> None:
    training.step(70)
    root = ray.get_actor(actors.root_name(training.monitor.run), namespace=actors.NAMESPACE)
    training.monitor.flush()
    lines = ray.get(root.history.remote(1))
    assert [line["step"] for line in lines] == [70, 70]
    # An actor with coroutines may take up calls in another order than they were sent in.
    (measured,) = (line for line in lines if "coverage" in line)
    assert measured["coverage"]["complete"]
    assert "state" not in measured
