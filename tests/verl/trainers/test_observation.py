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
from tensordict.tensorclass import NonTensorData, NonTensorStack
from verl.utils import tensordict_utils
from verl.workers.utils.padding import response_from_nested

import fp16_patch
from fp16_patch import Plan
from fp16_patch.mismatch.collection import rank
from fp16_patch.mismatch.statistics.summary import MismatchStats

pytestmark = pytest.mark.verl

PROMPTS, RESPONSES = (3, 1, 2, 4), (2, 4, 1, 3)


lag_of_label: dict[str, int] = {}


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
def observation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module under test; importing its package activates."""
    from fp16_patch.verl.trainers import observation

    # Of weights that samplers got last, what they drew is a version younger than of those of now.
    monkeypatch.setattr(
        observation.lags.versions,
        "lags",
        lambda restored: {label: lag - restored for label, lag in lag_of_label.items()},
    )
    fp16_patch.deactivate()
    yield observation
    fp16_patch.deactivate()


def order(
    data: TensorDict,
    observation: Any,
    run: str,
    number: int,
    rescores: bool,
    lags: dict[str, int] | None = None,
    number_of_pass: int = 0,
    restored: bool = False,
) -> None:
    lag_of_label.clear()
    lag_of_label.update(lags or {})
    of_the_driver = json.dumps([run, number, rescores, number_of_pass, bool(lags), restored])
    tensordict_utils.assign_non_tensor_data(data, observation.ORDER, of_the_driver)


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
    ((who, number, stats, floor, by_lag),) = reports
    assert (who, number, floor, by_lag) == (("run", 1, 2), 7, None, {})
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
    floor = reports[0][3]
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


# Of each response, the label of the sync under which its tokens were sampled: a run, or several.
RUNS = ([[3, 2, 4]], [[1, 1, 2], [2, 3, 3]], [[2, 1, 4]], [[4, 2, 3], [6, 1, 4]])
LAGS = {"2": 2, "3": 1, "4": 0}


def with_extra_fields(batch: TensorDict) -> None:
    """As verl's V1 trainer has them."""
    fields = [{"fp16_patch_versions": {"runs": runs}, "min_global_steps": 0} for runs in RUNS]
    batch["extra_fields"] = NonTensorStack(*map(NonTensorData, fields))


def with_columns(batch: TensorDict) -> None:
    """As verl's V0 trainer has them."""
    batch["fp16_patch_versions"] = NonTensorStack(*(NonTensorData({"runs": runs}) for runs in RUNS))


@pytest.mark.parametrize("give", [with_extra_fields, with_columns])
def test_each_token_has_the_lag_of_its_own_sync(
    batch: TensorDict, observation: Any, reports: list[Any], give: Any
) -> None:
    engine = Engine()
    give(batch)
    order(batch, observation, "run", 7, False, LAGS)
    observation.infer_batch(engine.infer, engine, (batch,), {})
    ((_, _, stats, _, by_lag),) = reports
    assert stats.tokens == 10
    assert {lag: part.tokens for lag, part in by_lag.items()} == {0: 4, 1: 5, 2: 1}


def test_without_runs_a_trajectory_that_spans_no_sync_has_its_lag_and_another_none(
    batch: TensorDict, observation: Any, reports: list[Any]
) -> None:
    engine = Engine()
    batch["min_global_steps"] = NonTensorStack(*map(NonTensorData, (4, 2, 3, 4)))
    batch["max_global_steps"] = NonTensorStack(*map(NonTensorData, (4, 3, 3, 9)))
    order(batch, observation, "run", 7, False, LAGS)
    observation.infer_batch(engine.infer, engine, (batch,), {})
    by_lag = reports[0][-1]
    assert {lag: part.tokens for lag, part in by_lag.items()} == {0: 2, 1: 1}


def test_nothing_is_said_of_samples_whose_sync_nobody_knows(
    batch: TensorDict, observation: Any, reports: list[Any]
) -> None:
    engine = Engine()
    order(batch, observation, "run", 7, False, {"77": 0})
    with_columns(batch)
    observation.infer_batch(engine.infer, engine, (batch,), {})
    assert reports[0][-1] == {}


def test_an_update_is_observed_in_its_first_mini_batch(batch: TensorDict, observation: Any, reports: list[Any]) -> None:
    engine = Engine()
    with_columns(batch)
    # Of one round: an update of two mini-batches, and another update.
    for number_of_pass, mini_batch in ((7, 0), (7, 1), (8, 0)):
        order(batch, observation, "run", 5, False, LAGS, number_of_pass)
        taken = observation.order_for_update(engine, batch)
        assert (taken is not None) == (mini_batch == 0)
        if taken is not None:
            assert tensordict_utils.get(batch, "return_model_output") is True
            observation.observe(engine, taken, batch, engine.infer(batch), LAGS)
    assert [number for _, number, *_ in reports] == [5, 5]
    assert reports[0][-1][0].tokens == 4


def test_a_pass_by_the_weights_of_the_last_sync_has_the_lags_of_then(
    batch: TensorDict, observation: Any, reports: list[Any]
) -> None:
    engine = Engine()
    with_columns(batch)
    order(batch, observation, "run", 7, False, {"2": 3, "3": 2, "4": 1}, restored=True)
    observation.infer_batch(engine.infer, engine, (batch,), {})
    assert {lag: part.tokens for lag, part in reports[0][-1].items()} == {0: 4, 1: 5, 2: 1}


def test_tokens_that_no_run_covers_are_of_unknown_lag(batch: TensorDict, observation: Any, reports: list[Any]) -> None:
    engine = Engine()
    # Of four tokens the last two; between two runs of one lag lies what a tool has answered.
    runs = ([[3, 2, 4]], [[3, 2, 4]], [[2, 1, 4]], [[4, 1, 4], [6, 1, 4]])
    batch["fp16_patch_versions"] = NonTensorStack(*(NonTensorData({"runs": of_row}) for of_row in runs))
    order(batch, observation, "run", 7, False, LAGS)
    observation.infer_batch(engine.infer, engine, (batch,), {})
    assert {lag: part.tokens for lag, part in reports[0][-1].items()} == {0: 8}


def test_an_engine_that_keeps_no_log_probs_of_an_update_reports_nothing(
    batch: TensorDict, observation: Any, reports: list[Any]
) -> None:
    engine = Engine()
    order(batch, observation, "run", 7, False)
    taken = observation.order_for_update(engine, batch)
    observation.observe(engine, taken, batch, {"model_output": {}}, {})
    assert reports == []
