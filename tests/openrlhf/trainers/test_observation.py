"""What a learner's rank observes of the replay buffer it starts to train on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openrlhf")
torch = pytest.importorskip("torch")

try:
    from openrlhf.trainer.ppo_utils.experience import Experience, remove_padding_in_sequences, split_experience_batch
except ImportError:  # up to 0.9.8
    from openrlhf.trainer.ppo_utils.experience_maker import Experience
    from openrlhf.trainer.ppo_utils.replay_buffer import remove_padding_in_sequences, split_experience_batch

import fp16_patch
from fp16_patch import Plan
from fp16_patch.mismatch.statistics.summary import MismatchStats

pytestmark = pytest.mark.openrlhf

LENGTHS, WIDTH = (5, 8, 3, 6), 8
RANK, RANKS = 1, 2


@pytest.fixture(autouse=True)
def observation() -> Any:
    """The module under test; importing its package activates."""
    from fp16_patch.openrlhf.trainers import observation

    fp16_patch.deactivate()
    yield observation
    fp16_patch.deactivate()


@pytest.fixture
def batch() -> Experience:
    """Sequences padded on the right; the first two tokens of each are its prompt."""
    torch.manual_seed(0)
    attention = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    actions = attention[:, 1:] & (torch.arange(WIDTH - 1) >= 1)
    sampler = -torch.rand(len(LENGTHS), WIDTH - 1)
    return Experience(
        sequences=torch.randint(0, 100, (len(LENGTHS), WIDTH)),
        attention_mask=attention.long(),
        action_mask=actions.long(),
        rollout_log_probs=sampler,
        action_log_probs=sampler + 0.01 * torch.randn_like(sampler),
        info={"reward": torch.zeros(len(LENGTHS))},
    )


@pytest.fixture(autouse=True)
def job(observation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is in a Ray job."""
    monkeypatch.setattr(observation.actors, "job_run", lambda: "job")


class Axis:
    def __init__(self, rank: int, size: int) -> None:
        self.get_local_rank, self.size = lambda: rank, lambda: size


def arguments_of(micro_batch_size: int) -> Any:
    """As the newest releases and the oldest name them."""
    rollout = SimpleNamespace(micro_batch_size=micro_batch_size, batch_size=4, n_samples_per_prompt=2)
    return SimpleNamespace(ds=SimpleNamespace(), rollout=rollout, train=SimpleNamespace(dynamic_batch_enable=False))


def trainer_of(batch: Experience, actor: Any = None, micro_batch_size: int = 2, sp_rank: int = 0) -> Any:
    args = arguments_of(micro_batch_size)
    mesh = {"dp": Axis(RANK, RANKS), "sp": Axis(sp_rank, 1 + sp_rank), "tp": Axis(0, 1)}
    items = remove_padding_in_sequences(split_experience_batch(batch))
    return SimpleNamespace(
        replay_buffer=SimpleNamespace(items=items),
        strategy=SimpleNamespace(args=args, ds_device_mesh=mesh, ring_attn_group=None),
        actor=actor,
    )


def test_every_action_of_the_buffer_is_observed_a_round_each_time(
    observation: Any, batch: Experience, reports: list[Any]
) -> None:
    trainer = trainer_of(batch)
    fp16_patch.activate(Plan(noise_floor_every=0))
    observation.observe_buffer(trainer)
    observation.observe_buffer(trainer)
    expected = MismatchStats.from_log_probs(batch.rollout_log_probs, batch.action_log_probs, batch.action_mask)
    assert [(who, number) for who, number, *_ in reports] == [(("job", RANK, RANKS), 0), (("job", RANK, RANKS), 1)]
    stats = reports[0][2]
    assert stats.tokens == int(batch.action_mask.sum())
    assert stats.d_abs_sum == pytest.approx(expected.d_abs_sum)
    worst = stats.worst_tokens()[0]
    row = worst.sequence - RANK * len(LENGTHS)
    # The first two tokens are the prompt, so the first action is of the third.
    assert worst.token_id == batch.sequences[row, worst.position + 2]


def test_ranks_that_share_sequences_report_once(observation: Any, batch: Experience, reports: list[Any]) -> None:
    fp16_patch.activate(Plan(noise_floor_every=0))
    observation.observe_buffer(trainer_of(batch, sp_rank=1))
    assert reports == []


def test_without_the_monitor_rounds_are_counted_and_nothing_observed(
    observation: Any, batch: Experience, reports: list[Any]
) -> None:
    fp16_patch.activate(Plan(monitor=False))
    observation.observe_buffer(trainer_of(batch))
    assert reports == []


def test_the_noise_floor_is_the_learner_against_itself_alone(
    observation: Any, batch: Experience, reports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    passes: list[int] = []

    class Actor(torch.nn.Module):
        def forward(self, sequences: Any, action_mask: Any, attention_mask: Any) -> Any:
            assert not self.training
            passes.append(len(sequences))
            (row,) = (index for index in range(len(LENGTHS)) if torch.equal(own(index), sequences[0]))
            return (batch.action_log_probs[row, : action_mask.shape[1]] - 1e-3)[None]

    def own(index: int) -> Any:
        return batch.sequences[index, : LENGTHS[index]]

    actor = Actor().train()
    fp16_patch.activate(Plan(noise_floor_share=0.5))
    observation.observe_buffer(trainer_of(batch, actor))
    floor = reports[0][3]
    assert passes == [1, 1]
    assert actor.training
    assert floor.metrics()["mismatch/mean_abs"] == pytest.approx(1e-3, rel=1e-2)


def test_an_error_on_this_rank_does_not_keep_it_from_the_noise_floor_that_all_ranks_take_part_in(
    observation: Any, batch: Experience, reports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_item: Any) -> bool:
        raise RuntimeError("planted")

    floors: list[Any] = []
    monkeypatch.setattr(observation, "has_sampler_log_probs", broken)
    monkeypatch.setattr(observation.rank, "noise_floor", lambda *parts: floors.append(parts))
    fp16_patch.activate(Plan())
    observation.observe_buffer(trainer_of(batch))
    assert len(floors) == 1
    assert reports == []


def test_sequences_that_were_scored_alone_are_not_scored_again(
    observation: Any, batch: Experience, reports: list[Any]
) -> None:
    fp16_patch.activate(Plan())
    observation.observe_buffer(trainer_of(batch, micro_batch_size=1))
    assert reports[0][3] is None
