"""The sanity runs: which problems, which trainings, what is read from them and what is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("pandas")

import pandas as pd
from rich.console import Console

from fp16_patch.mismatch.record.reading import RunRecord
from fp16_patch.mismatch.record.step_metrics import StepMetrics
from integration.bench import sanity, solvable, training
from integration.bench.solvable import Draw
from integration.bench.training import Settings, Training
from integration.cpu.process import RunResult
from integration.demo.task import Problem, problems

QUIET = Console(quiet=True)
FACTS = {"kept": 2, "drawn": 4, "low": 0.2, "high": 0.8, "solve_rate_of_kept": 0.5}


def record(tmp_path: Path, steps: dict[int, dict[str, float]]) -> RunRecord:
    return RunRecord(tmp_path, steps=StepMetrics.of(steps))


def run_of(reward: list[float], d: list[float], skipped: list[float] | None = None) -> dict[str, Any]:
    curves = {"reward": reward, "mean_abs": d, "seq_mean_abs": d, "k3": d, "grad_norm": d}
    return {"curves": {**curves, "skipped": skipped or [], "loss_scale": []}, "seconds": 60}


def test_problems_are_kept_from_the_low_end_to_the_high_both_included() -> None:
    candidates = problems(5, 0)
    chosen = solvable.select(candidates, [0.0, 0.2, 0.5, 0.8, 1.0])
    assert chosen == [(candidates[1], 0.2), (candidates[2], 0.5), (candidates[3], 0.8)]
    facts = solvable.facts_of([0.0, 0.2, 0.5, 0.8, 1.0], chosen)
    assert (facts["kept"], facts["solve_rate_of_all"]) == (3, pytest.approx(0.5))
    assert facts["problems"][0] == {"left": candidates[1].left, "right": candidates[1].right, "solve_rate": 0.2}


def test_problems_are_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvable, "solve_rates", lambda _model, asked, _samples: [0.5] * (len(asked) - 1) + [1.0])
    chosen = solvable.prepare(tmp_path, tmp_path / "data", Draw(drawn=4, samples=2))
    assert chosen.facts["kept"] == len(pd.read_parquet(chosen.train)) == len(pd.read_parquet(chosen.val)) == 3
    monkeypatch.setattr(solvable, "solve_rates", lambda *_: pytest.fail("asked again"))
    assert solvable.prepare(tmp_path, tmp_path / "data", Draw(drawn=4, samples=2)) == chosen
    monkeypatch.setattr(solvable, "solve_rates", lambda _model, asked, _samples: [0.5] * len(asked))
    assert solvable.prepare(tmp_path, tmp_path / "data", Draw(drawn=5, samples=2)).facts["kept"] == 5


def test_a_solve_rate_is_of_the_problem_that_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp16_patch.probe.sequences import Sampled
    from integration.cpu.tiny_model import character_tokenizer, make_random_model

    tokenizer, answers = character_tokenizer(), iter(["005", "004", "011", "011"])

    def answered(_model: Any, prompts: list[list[int]], *_: Any, **__: Any) -> list[Sampled]:
        ids = [tokenizer(answer)["input_ids"] for answer in answers]
        return [Sampled(tuple(p), tuple(r), (0.0,) * len(r)) for p, r in zip(prompts, ids, strict=True)]

    monkeypatch.setattr(solvable, "decode", answered)
    model = make_random_model(tmp_path, hidden_size=32, layers=1)
    assert solvable.solve_rates(model, [Problem(2, 3), Problem(5, 6)], samples=2) == [0.5, 1.0]


def test_the_first_algorithm_has_every_seed_and_the_others_one() -> None:
    planned = list(sanity.trainings(list(sanity.ALGORITHMS), [4, 5]))
    assert len({one.name for one, _ in planned}) == len(planned) == 2 * (len(sanity.ALGORITHMS) + 1)
    assert {one.seed for one, (algorithm, _) in planned if algorithm != sanity.MAIN} == {4}
    for algorithm in sanity.ALGORITHMS:
        bf16, fp16 = (
            next(one for one, key in planned if key == (algorithm, arm) and one.seed == 4) for arm in ("bf16", "fp16")
        )
        assert set(fp16.overrides) - set(bf16.overrides) == {"actor_rollout_ref.model.external_lib=fp16_patch.verl"}
        assert bf16.env == {"FP16_PATCH": "observe"}


def test_the_seed_reaches_data_sampling_and_mini_batches(tmp_path: Path) -> None:
    chosen = solvable.ProblemSet(tmp_path, tmp_path, {})
    config = training.config_of(
        Training("a", 7, ("x=1",)), Settings(steps=3, updates=4), tmp_path, chosen, tmp_path / "a"
    )
    assert {override for override in config.overrides if override.endswith("seed=7")} == set(training.seeded(7))
    assert config.overrides[-1] == "x=1"
    assert "actor_rollout_ref.actor.ppo_mini_batch_size=2" in config.overrides


def test_curves_have_a_place_for_every_step(tmp_path: Path) -> None:
    steps = {
        1: {"critic/score/mean": 0.25, "mismatch/mean_abs": 1.23456789e-3},
        3: {"critic/score/mean": 0.5, "mismatch/mean_abs": math.nan},
    }
    curves = training.curves_of(record(tmp_path, steps), 3)
    assert curves["reward"] == [0.25, None, 0.5]
    assert curves["mean_abs"] == [1.2346e-3, None, None]
    assert curves["loss_scale"] == []


def test_the_ends_are_of_a_quarter_of_the_steps() -> None:
    run = run_of([0.0, 0.2, 0.4, 0.4, 0.4, 0.6, 0.8, 1.0], [None, None, 1, 1, 1, 1, 2, 4])
    assert training.ends(run["curves"]) == pytest.approx(
        {"start_reward": 0.1, "reward": 0.9, "mean_abs": 3, "seq_mean_abs": 3, "k3": 3}
    )


def test_the_summary_has_the_ratio_by_seed() -> None:
    arms = {
        "bf16": {"0": run_of([0.2, 0.6], [4.0, 6.0]), "1": run_of([0.2, 0.8], [8.0, 8.0])},
        "fp16": {"0": run_of([0.3, 0.7], [0.5, 0.5], [0.0, 1.0]), "1": run_of([0.3, 0.9], [1.0, 1.0], [0.0, 0.0])},
    }
    summary = sanity.summarize(arms)
    assert summary["bf16 ÷ fp16"] == {"0": 10.0, "1": 8.0}
    assert summary["ratio"] == {"mean": 9.0, "min": 8.0, "max": 10.0}
    assert summary["bf16"]["reward"] == pytest.approx({"mean": 0.7, "min": 0.6, "max": 0.8})
    assert summary["reward_difference"] == pytest.approx(0.1)
    assert summary["reward_separates"] is False
    assert (summary["bf16"]["skipped"], summary["fp16"]["skipped"]) == (0, 1.0)
    alone = sanity.summarize({arm: {"0": runs["0"]} for arm, runs in arms.items()})
    assert alone["reward_separates"] is None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [((0.1, 0.2), (0.3, 0.4), True), ((0.3, 0.4), (0.1, 0.2), True), ((0.1, 0.3), (0.2, 0.4), False)],
)
def test_rewards_separate_where_no_seed_of_one_reaches_the_other(one: Any, other: Any, expected: bool) -> None:
    ranges = [dict(zip(("min", "max"), ends, strict=True)) for ends in (one, other)]
    assert sanity.apart(*ranges) is expected


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the runs that were started, none of them really."""
    started: list[str] = []

    def run(config: Any, on_step: Callable[[dict[str, Any]], None]) -> RunResult:
        config.out.mkdir(parents=True)
        started.append(config.out.name)
        on_step({"step": 1})
        return RunResult(0, None, [], 60.0, 30.0, config.out / "log.txt")

    monkeypatch.setattr(training, "run", run)
    gaps = dict.fromkeys(("mismatch/mean_abs", "mismatch/seq_mean_abs", "mismatch/k3"), 1e-3)
    steps = {1: {"critic/score/mean": 0.5, "fp16/step_skipped": 0.0, **gaps}}
    monkeypatch.setattr(training, "load_run", lambda _out: record(tmp_path, steps))
    monkeypatch.setattr(sanity.offline, "demo_checkpoint", lambda *_: tmp_path)
    chosen = solvable.ProblemSet(tmp_path, tmp_path, FACTS)
    monkeypatch.setattr(sanity.solvable, "prepare", lambda *_: chosen)
    return started


def test_a_run_of_the_same_settings_is_not_repeated(tmp_path: Path, launched: list[str]) -> None:
    measured = sanity.measure(tmp_path, [0], ["grpo"], Settings(1), QUIET)
    assert launched == ["grpo-bf16-0", "grpo-fp16-0"]
    assert json.loads(json.dumps(measured)) == measured
    assert sanity.measure(tmp_path, [0], ["grpo"], Settings(1), QUIET) == measured
    sanity.measure(tmp_path, [0, 1], ["grpo"], Settings(1), QUIET)
    assert launched[2:] == ["grpo-bf16-1", "grpo-fp16-1"]
    sanity.measure(tmp_path, [0], ["grpo"], Settings(1, learning_rate=1.0), QUIET)
    assert len(launched) == 6
    sanity.show(measured, QUIET)


def test_a_run_that_failed_is_not_kept(tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(config: Any, _on_step: Any) -> RunResult:
        config.out.mkdir(parents=True)
        (config.out / "log.txt").write_text("out of memory\n")
        return RunResult(1, None, [], 60.0, None, config.out / "log.txt")

    with monkeypatch.context() as broken:
        broken.setattr(training, "run", failed)
        with pytest.raises(RuntimeError, match="grpo-bf16-0: 1\nout of memory"):
            sanity.measure(tmp_path, [0], ["grpo"], Settings(1), QUIET)
    sanity.measure(tmp_path, [0], ["grpo"], Settings(1), QUIET)
    assert launched == ["grpo-bf16-0", "grpo-fp16-0"]


def test_sections_of_many_runs_are_measured_when_asked_for() -> None:
    from integration.bench import evidence

    assert set(evidence.sections(full=True)) - set(evidence.sections(full=False)) == set(evidence.FULL)
    assert evidence.SECTIONS.keys() == set(evidence.sections(full=True))
    assert all(callable(bench.show) for bench in evidence.SECTIONS.values())
