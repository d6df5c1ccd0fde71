"""A rank's part: what it reports, and the learner against itself, where every rank takes part or none does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import distributed, multiprocessing

from fp16_patch.mismatch.collection import rank
from fp16_patch.mismatch.statistics.summary import MismatchStats

RANKS = 2


def stats() -> MismatchStats:
    sampler = torch.full((1, 2), -1.0)
    return MismatchStats.from_log_probs(sampler, sampler + 0.5, torch.ones(1, 2))


def broken(*_chosen: Any) -> Any:
    raise RuntimeError("planted")


def scored_together(number: int, folder: Path, fails: bool) -> None:
    """One rank's process: chooses, and scores in a collective, as the forward pass of a sharded model is one."""
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=number, world_size=RANKS)
    passes = []

    def score(chosen: Any) -> MismatchStats:
        passes.append(chosen)
        distributed.all_reduce(torch.zeros(1))
        return stats()

    floor = rank.noise_floor(broken if fails and number == 0 else lambda: "rows", score)
    # A rank that had gone on alone would hang here or there.
    distributed.barrier()
    (folder / f"{number}.txt").write_text(f"{len(passes)} {floor is not None}")
    distributed.destroy_process_group()


@pytest.mark.parametrize(("fails", "passes"), [(False, "1 True"), (True, "0 False")], ids=["all choose", "one raises"])
def test_all_ranks_score_again_or_none_does(fails: bool, passes: str, tmp_path: Path) -> None:
    multiprocessing.spawn(scored_together, (tmp_path, fails), nprocs=RANKS)
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(RANKS)] == [passes] * RANKS


def scored_apart(number: int, folder: Path, collective: bool) -> None:
    """One rank's process, of which the first fails in its scoring, where the second may wait for it."""
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=number, world_size=RANKS)
    rank.OTHERS_TIMEOUT_S = 3.0 if collective else 60.0

    def score(chosen: Any) -> MismatchStats:
        if number == 0:
            raise RuntimeError("planted")
        if collective:
            distributed.all_reduce(torch.zeros(1))
        return stats()

    try:
        ended = f"floor {rank.noise_floor(lambda: 'rows', score) is not None}"
    except Exception as failure:
        ended = f"{type(failure).__name__}: {failure}"
    (folder / f"{number}.txt").write_text(ended)
    if collective:
        return  # as a process that an error has ended: its peers see the connection close
    distributed.barrier()
    distributed.destroy_process_group()


def test_an_error_in_one_ranks_scoring_is_a_warning_if_nobody_waits_for_it(tmp_path: Path) -> None:
    multiprocessing.spawn(scored_apart, (tmp_path, False), nprocs=RANKS)
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(RANKS)] == ["floor False", "floor True"]


@pytest.mark.timeout(120)
def test_one_that_others_wait_for_ends_the_run_with_its_reason_and_does_not_hang(tmp_path: Path) -> None:
    multiprocessing.spawn(scored_apart, (tmp_path, True), nprocs=RANKS)
    failed, released = ((tmp_path / f"{number}.txt").read_text() for number in range(RANKS))
    assert failed.startswith("RankLeftAlone: RuntimeError in the noise floor's forward pass on this rank: planted.")
    assert "noise_floor_every=0" in failed
    assert released == "floor False"  # its own error is that the first rank is gone


def test_without_a_process_group_a_rank_decides_alone() -> None:
    assert rank.noise_floor(lambda: "rows", lambda chosen: stats()) is not None
    assert rank.noise_floor(lambda: None, broken) is None


@pytest.mark.parametrize("fails", ["choose", "score"])
def test_an_error_in_the_noise_floor_is_a_warning(
    fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank.guard, "_warned", False)
    with caplog.at_level(logging.WARNING):
        assert rank.noise_floor(broken if fails == "choose" else lambda: "rows", broken) is None
    assert [record.getMessage() for record in caplog.records] == [
        "the mismatch is not observed on this rank, training goes on: planted"
    ]


def test_each_run_has_one_observer(reports: list[Any]) -> None:
    for run, number in (("a", 0), ("a", 1), ("b", 0)):
        rank.observe(run, 1, RANKS, number, lambda: (stats(), {}), None)
    assert [(who, number) for who, number, *_ in reports] == [
        (("a", 1, RANKS), 0),
        (("a", 1, RANKS), 1),
        (("b", 1, RANKS), 0),
    ]
    assert [*rank._observers] == ["b"]
