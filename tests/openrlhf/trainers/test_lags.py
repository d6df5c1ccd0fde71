"""A learner's rank knows how old each token is that it trains on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openrlhf")
torch = pytest.importorskip("torch")
try:
    from openrlhf.trainer.ppo_utils.experience import (
        Experience,
        make_experience_batch,
        remove_padding_in_sequences,
        split_experience_batch,
    )
except ImportError:
    pytest.skip("up to 0.9.8, replay buffers drop the prompts", allow_module_level=True)

import fp16_patch
from fp16_patch import Plan

pytestmark = pytest.mark.openrlhf

LENGTHS, WIDTH, PROMPT = (6, 8, 4), 8, 2


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> Any:
    from fp16_patch.openrlhf.trainers import observation

    fp16_patch.deactivate()
    fp16_patch.activate(Plan(noise_floor_every=0))
    monkeypatch.setattr(observation.actors, "job_run", lambda: "job")
    yield
    fp16_patch.deactivate()


def prompt_of(*runs: tuple[int, int, int]) -> str:
    from fp16_patch.openrlhf.samplers.weight_versions import SampledPrompt

    return SampledPrompt("the same for all", list(runs))


def experience_of(prompts: list[str]) -> Any:
    """Sequences padded on the right; d is 1e-3 where the sampler's weights are the learner's, else larger."""
    attention = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    actions = attention[:, 1:] & (torch.arange(WIDTH - 1) >= PROMPT - 1)
    return Experience(
        sequences=torch.randint(0, 100, (len(LENGTHS), WIDTH)),
        attention_mask=attention.long(),
        action_mask=actions.long(),
        rollout_log_probs=torch.zeros(len(LENGTHS), WIDTH - 1),
        action_log_probs=torch.full((len(LENGTHS), WIDTH - 1), 1e-3),
        prompts=prompts,
        labels=[""] * len(prompts),
        info={"reward": torch.zeros(len(LENGTHS))},
    )


def trainer_of(experience: Any, *, asynchronous: bool = True) -> Any:
    axis = SimpleNamespace(get_local_rank=lambda: 0, size=lambda: 1)
    args = SimpleNamespace(ds=SimpleNamespace(), train=SimpleNamespace(async_enable=asynchronous))
    return SimpleNamespace(
        replay_buffer=SimpleNamespace(items=remove_padding_in_sequences(split_experience_batch(experience))),
        strategy=SimpleNamespace(args=args, ds_device_mesh=dict.fromkeys(("dp", "sp", "tp"), axis)),
        actor=torch.nn.Linear(1, 1),
    )


def observed(trainer: Any, reports: list[Any]) -> dict[int, int]:
    """Let the rank observe its buffer; return how many tokens it has of each lag."""
    from fp16_patch.openrlhf.trainers.observation import observe_buffer

    observe_buffer(trainer)
    *_, by_lag = reports[-1]
    return {lag: stats.tokens for lag, stats in by_lag.items()}


def update(trainer: Any, *, skipped: bool = False) -> None:
    """Let the trainer take its step, as `ActorPPOTrainer.ppo_train` does, and broadcast."""
    from fp16_patch.openrlhf.trainers import lags, ppo

    def trained(_role: str, _prefix: str, _engine: Any, _train: Any) -> dict[str, Any]:
        return {"fp16/step_skipped": float(skipped)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "observe_buffer", lambda trainer: None)
        patch.setattr(ppo, "train_and_report", trained)
        ppo.train_actor(None, trainer, (), {})
    lags.broadcast_to_vllm(lambda: None, trainer, (), {})


def test_a_response_that_spans_a_broadcast_is_of_two_lags(reports: list[Any]) -> None:
    trainer = trainer_of(experience_of([
        prompt_of((PROMPT, 4, 0)), prompt_of((PROMPT, 1, 0), (PROMPT + 1, 5, 1)), prompt_of((PROMPT, 2, 1))
    ]))  # fmt: skip
    update(trainer)
    assert observed(trainer, reports) == {0: 5 + 2, 1: 4 + 1}
    update(trainer)
    assert observed(trainer, reports) == {1: 5 + 2, 2: 4 + 1}


def test_at_the_start_both_sides_have_the_same_weights(reports: list[Any]) -> None:
    trainer = trainer_of(experience_of([prompt_of((PROMPT, length - PROMPT, 0)) for length in LENGTHS]))
    assert observed(trainer, reports) == {0: sum(LENGTHS) - PROMPT * len(LENGTHS)}
    assert len({id(stats) for stats in (reports[-1][2], *reports[-1][-1].values())}) == 1


def test_a_skipped_step_makes_no_older_samples(reports: list[Any]) -> None:
    trainer = trainer_of(experience_of([prompt_of((PROMPT, length - PROMPT, 0)) for length in LENGTHS]))
    update(trainer, skipped=True)
    assert set(observed(trainer, reports)) == {0}


def test_tokens_of_which_nothing_is_known_are_of_no_lag(reports: list[Any]) -> None:
    later_than_known = prompt_of((PROMPT, 2, 9))
    trainer = trainer_of(experience_of(["a plain prompt", prompt_of((PROMPT + 2, 4, 0)), later_than_known]))
    assert observed(trainer, reports) == {0: 4}


def test_synchronous_runs_are_measured_as_one(reports: list[Any]) -> None:
    trainer = trainer_of(
        experience_of([prompt_of((PROMPT, length - PROMPT, 0)) for length in LENGTHS]), asynchronous=False
    )
    update(trainer)
    assert observed(trainer, reports) == {}


def test_what_is_known_survives_padding_splitting_and_packing() -> None:
    from fp16_patch.openrlhf.trainers.lags import lags_of

    prompts = [prompt_of((PROMPT, length - PROMPT, row)) for row, length in enumerate(LENGTHS)]
    samples = split_experience_batch(experience_of(prompts))
    whole = Experience.concat_experiences([make_experience_batch([sample]) for sample in samples], 0)
    items = remove_padding_in_sequences(split_experience_batch(whole))
    lags = lags_of(items, {"0": 2, "1": 1, "2": 0}, whole.action_mask)
    assert [row[mask.bool()].unique().tolist() for row, mask in zip(lags, whole.action_mask, strict=True)] == [
        [2], [1], [0]
    ]  # fmt: skip


@pytest.mark.parametrize(("asynchronous", "watched"), [(True, ["engine"]), (False, [])])
def test_only_asynchronous_runs_have_their_engines_note_versions(
    asynchronous: bool, watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp16_patch.openrlhf.trainers import driver

    seen: list[str] = []
    monkeypatch.setattr(driver.weight_versions, "watch", seen.extend)
    args = SimpleNamespace(ds=SimpleNamespace(), train=SimpleNamespace(async_enable=asynchronous))
    followed = driver.OpenRLHFDriver(SimpleNamespace(args=args, vllm_engines=["engine"]))
    followed.monitor = SimpleNamespace(measures=True)  # type: ignore[assignment]
    followed.follow_versions()
    assert seen == watched
