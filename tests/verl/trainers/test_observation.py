"""What a learner's rank observes: the sampled tokens' log-probs, those verl itself compares, and only where ordered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl")
torch = pytest.importorskip("torch")

from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.workers.utils.padding import response_from_nested

import fp16_patch
from fp16_patch import Plan
from fp16_patch.mismatch.collection import rank
from fp16_patch.mismatch.statistics.summary import MismatchStats

pytestmark = pytest.mark.verl

PROMPTS, RESPONSES = (3, 1, 2, 4), (2, 4, 1, 3)


def jagged(lengths: tuple[int, ...], make: Any = torch.rand) -> Any:
    return torch.nested.as_nested_tensor([make(length) for length in lengths], layout=torch.jagged)


@pytest.fixture
def batch() -> TensorDict:
    torch.manual_seed(0)
    data = TensorDict(
        {
            "input_ids": jagged(tuple(map(sum, zip(PROMPTS, RESPONSES, strict=True)))),
            "responses": jagged(RESPONSES, lambda length: torch.arange(length)),
            "response_mask": jagged(RESPONSES, torch.ones),
            "rollout_log_probs": jagged(RESPONSES, lambda length: -torch.rand(length)),
        },
        batch_size=len(PROMPTS),
    )
    tensordict_utils.assign_non_tensor(data, micro_batch_size_per_gpu=2, use_dynamic_bsz=False)
    return data


@pytest.fixture(autouse=True)
def observation() -> Iterator[Any]:
    """The module under test; importing its package activates."""
    from fp16_patch.verl.trainers import observation

    fp16_patch.deactivate()
    yield observation
    fp16_patch.deactivate()


def order(data: TensorDict, observation: Any, *of_the_driver: Any) -> None:
    tensordict_utils.assign_non_tensor_data(data, observation.ORDER, json.dumps(of_the_driver))


class Engine:
    """An actor's engine on one rank, whose log-probs depend on the sequence alone, or on its company too."""

    model_config = SimpleNamespace(model_type="language_model")
    engine_config = SimpleNamespace(forward_only=False)

    def __init__(self, company_matters: float = 0.0) -> None:
        self.company_matters = company_matters
        self.passes: list[int] = []

    def infer(self, data: TensorDict, loss_function: Any = None) -> dict[str, Any]:
        self.passes.append(len(data))
        rows = [row - 1 - self.company_matters * (len(data) > 1) for row in data["input_ids"].unbind()]
        return {"model_output": {"log_probs": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}}

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True

    def get_data_parallel_rank(self) -> int:
        return 1

    def get_data_parallel_size(self) -> int:
        return 2


def test_the_response_part_is_what_verl_cuts_out(batch: TensorDict, observation: Any) -> None:
    log_probs = batch["input_ids"]
    expected = response_from_nested(log_probs, batch["response_mask"]).to_padded_tensor(0.0)
    lengths, sequences = torch.tensor(RESPONSES), log_probs.offsets().diff()
    assert torch.equal(observation.response_log_probs(log_probs, lengths, sequences), expected)


def test_an_ordered_pass_is_observed_on_its_rank(batch: TensorDict, observation: Any, reports: list[Any]) -> None:
    engine = Engine()
    order(batch, observation, "run", 7, False)
    outputs = observation.infer_batch(engine.infer, engine, (batch,), {})
    ((who, number, stats, floor),) = reports
    assert (who, number, floor) == (("run", 1, 2), 7, None)
    learner = response_from_nested(outputs["model_output"]["log_probs"], batch["response_mask"])
    expected = MismatchStats.from_log_probs(
        *(side.to_padded_tensor(0.0) for side in (batch["rollout_log_probs"], learner, batch["response_mask"]))
    )
    assert stats.tokens == sum(RESPONSES)
    assert stats.d_abs_sum == pytest.approx(expected.d_abs_sum)
    assert {worst.sequence for worst in stats.worst_tokens()} <= {4, 5, 6, 7}  # the second rank's rows
    assert observation.ORDER not in batch.keys()  # noqa: SIM118


def test_a_pass_nobody_ordered_is_left_alone(batch: TensorDict, observation: Any, reports: list[Any]) -> None:
    engine = Engine()
    observation.infer_batch(engine.infer, engine, (batch,), {})
    assert engine.passes == [len(batch)]
    assert reports == []


@pytest.mark.parametrize("company_matters", [0.0, 1e-3])
def test_the_noise_floor_is_the_learner_against_itself_alone(
    batch: TensorDict, observation: Any, reports: list[Any], company_matters: float
) -> None:
    engine = Engine(company_matters)
    order(batch, observation, "run", 0, True)
    fp16_patch.activate(Plan(noise_floor_share=0.25))
    observation.infer_batch(engine.infer, engine, (batch,), {})
    assert engine.passes == [4, 1]
    floor = reports[0][-1]
    assert floor.tokens == RESPONSES[0]
    assert floor.metrics()["mismatch/mean_abs"] == pytest.approx(company_matters, rel=1e-3)


def test_a_failing_observation_is_one_warning_and_no_more(
    batch: TensorDict,
    observation: Any,
    reports: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_arguments: Any, **_settings: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(observation, "_compare", broken)
    monkeypatch.setattr(rank.guard, "_warned", False)
    caplog.set_level("WARNING")  # something that verl imports makes it ERROR, in the whole process
    engine = Engine()
    for number in range(2):
        order(batch, observation, "run", number, False)
        assert "model_output" in observation.infer_batch(engine.infer, engine, (batch,), {})
    assert reports == []
    assert [record.getMessage() for record in caplog.records if "planted" in record.getMessage()] == [
        "the mismatch is not observed on this rank, training goes on: planted"
    ]


@pytest.mark.parametrize(("rows", "share", "chosen"), [(32, 0.03, [0]), (32, 0.125, [0, 8, 16, 24]), (2, 1.0, [0, 1])])
def test_rescored_rows_are_spread_evenly(rows: int, share: float, chosen: list[int]) -> None:
    assert rank.rows_to_rescore(rows, share) == chosen
