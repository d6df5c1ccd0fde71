"""What a rank of the legacy actor observes: the sampled tokens' log-probs, and only where ordered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl")
torch = pytest.importorskip("torch")

from verl import DataProto

import fp16_patch
from fp16_patch import Plan
from fp16_patch.mismatch.statistics.summary import MismatchStats

pytestmark = pytest.mark.verl

SEQUENCES, RESPONSE = 4, 3
ACTOR = SimpleNamespace(ulysses_sequence_parallel_size=1)


@pytest.fixture(autouse=True)
def observation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of both engines' observers; importing its package activates."""
    from fp16_patch.verl.trainers import observation

    fp16_patch.deactivate()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    yield observation
    fp16_patch.deactivate()


@pytest.fixture
def batch() -> DataProto:
    torch.manual_seed(0)
    tensors = {
        "responses": torch.arange(SEQUENCES * RESPONSE).view(SEQUENCES, RESPONSE),
        "response_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]),
        "rollout_log_probs": -torch.rand(SEQUENCES, RESPONSE),
    }
    return DataProto.from_dict(tensors=tensors, meta_info={"micro_batch_size": 2, "use_dynamic_bsz": False})


class Scorer:
    """An actor's log-probs, which depend on the sequence alone, or on its company too; as each release returns them."""

    def __init__(self, *, named: bool, company_matters: float = 0.0) -> None:
        self.named, self.company_matters = named, company_matters
        self.passes: list[int] = []

    def __call__(self, data: DataProto, calculate_entropy: bool = False) -> Any:
        self.passes.append(len(data))
        company = data.meta_info["micro_batch_size"] - 1
        log_probs = -0.01 * data.batch["responses"].float() - self.company_matters * company
        return {"log_probs": log_probs} if self.named else (log_probs, None)


def score(observation: Any, batch: DataProto, scorer: Scorer, *order: Any) -> Any:
    from fp16_patch.verl.legacy.observation import compute_log_prob

    if order:
        batch.meta_info[observation.ORDER] = json.dumps([*order, 1, False, False])
    return compute_log_prob(scorer, ACTOR, (), {"data": batch})


def stats_of(batch: DataProto, learner: Any, **more: Any) -> MismatchStats:
    tensors = batch.batch
    return MismatchStats.from_log_probs(tensors["rollout_log_probs"], learner, tensors["response_mask"], **more)


@pytest.mark.parametrize("named", [True, False], ids=["dictionary", "pair"])
def test_an_ordered_pass_is_observed(observation: Any, batch: DataProto, reports: list[Any], named: bool) -> None:
    fp16_patch.activate(Plan(mode="observe", strict=False))
    outputs = score(observation, batch, Scorer(named=named), "run", 7, False)
    learner = outputs["log_probs"] if named else outputs[0]
    ((who, number, stats, floor, _),) = reports
    assert who == ("run", 1, 2)
    assert (number, floor) == (7, None)
    assert stats.tokens == 9
    expected = stats_of(batch, learner, token_ids=batch.batch["responses"], first_sequence=SEQUENCES)
    assert stats.to_bytes() == expected.to_bytes()


def test_other_passes_are_not(observation: Any, batch: DataProto, reports: list[Any]) -> None:
    scorer = Scorer(named=True)
    score(observation, batch, scorer)
    del batch.batch["rollout_log_probs"]
    score(observation, batch, scorer, "run", 1, True)
    assert reports == []
    assert scorer.passes == [SEQUENCES] * 2


def test_the_noise_floor_is_the_learner_against_itself_alone(
    observation: Any, batch: DataProto, reports: list[Any]
) -> None:
    fp16_patch.activate(Plan(mode="observe", strict=False, noise_floor_share=0.5))
    scorer = Scorer(named=True, company_matters=0.25)
    score(observation, batch, scorer, "run", 1, True)
    floor = reports[0][3]
    assert scorer.passes == [SEQUENCES, 2]
    assert floor.tokens == 4
    assert floor.d_abs_max == pytest.approx(0.25)
    assert batch.meta_info["micro_batch_size"] == 2
