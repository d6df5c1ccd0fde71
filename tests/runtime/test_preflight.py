"""Asking processes, and what a worker does that was never asked about."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from fp16_patch import PrecisionError
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime import activation, preflight, propagation
from fp16_patch.runtime.ledger import Ledger


class Actor:
    """A Ray actor handle, as far as the check uses one."""

    def __init__(self, fails: bool = False) -> None:
        self.__ray_call__ = SimpleNamespace(remote=self._refuse if fails else lambda function: function(None))

    def _refuse(self, function: Any) -> Any:
        return ModuleNotFoundError("No module named 'fp16_patch'")


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(result: Any, timeout: float) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=get))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """This process under an FP16 plan, without patches."""
    monkeypatch.setattr(activation._state, "plan", Plan())
    monkeypatch.setattr(activation._state, "ledger", Ledger(kind="worker"))
    activation._state.sums.hold()
    yield activation._state.ledger
    activation._state.sums.release()


def test_a_process_answers_with_its_record(planned: Ledger) -> None:
    (record,) = preflight.ask([("worker", Actor())])
    assert (record["kind"], record["mode"], record["problem"]) == ("worker", "fp16", None)


def test_a_process_that_cannot_answer_is_a_record_with_a_problem() -> None:
    (record,) = preflight.ask([("server", Actor(fails=True))])
    assert record["kind"] == "server"
    assert record["problem"] == "no attestation: ModuleNotFoundError: No module named 'fp16_patch'"


def test_a_handle_that_cannot_even_be_asked_is_a_record_too() -> None:
    dead = SimpleNamespace(__ray_call__=SimpleNamespace(remote=lambda function: 1 / 0))
    records = preflight.ask([("worker", dead), ("worker", Actor())])
    assert records[0]["problem"] == "no attestation: ZeroDivisionError: division by zero"
    assert len(records) == 2


def test_a_process_where_nothing_is_active_says_so() -> None:
    (record,) = preflight.ask([("worker", Actor())])
    assert record["problem"] == "fp16_patch is not active in this process"


def test_a_server_answers_for_children_that_left_nothing(planned: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    present = Ledger(kind="engine_core").record(Plan(), {})
    monkeypatch.setattr(propagation, "expected_children", lambda: {"engine_core": 1, "sampler_worker": 2})
    monkeypatch.setattr(propagation, "children", lambda: [present])
    records = preflight.ask([("server", Actor())])
    assert [record["kind"] for record in records[1:]] == ["engine_core", "sampler_worker", "sampler_worker"]
    assert [bool(record["problem"]) for record in records[1:]] == [False, True, True]


def test_a_worker_nobody_asked_about_refuses_to_step(planned: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "inside_ray_actor", lambda: True)
    with pytest.raises(PrecisionError, match="nobody checked this job"):
        preflight.require_training_grant()
    preflight.grant_training([("worker", Actor())], None)
    preflight.require_training_grant()


def test_leave_to_train_comes_with_what_the_samplers_keep(planned: Ledger) -> None:
    planned.note("rollout", "engine_weight", "float16")
    planned.note_kept("rollout", parameters={"gate.weight"}, buffers=set())
    assert planned.sampler_keeps is None
    preflight.PreflightCheck("verl").run(1, [("worker", Actor())], {}, publish=lambda answers: None)
    assert planned.sampler_keeps == {"parameters": ["gate.weight"], "buffers": []}


def test_outside_ray_there_is_no_driver_to_wait_for(planned: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "inside_ray_actor", lambda: False)
    preflight.require_training_grant()


def test_observe_stops_nobody(planned: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation._state, "plan", Plan(mode="observe"))
    monkeypatch.setattr(preflight, "inside_ray_actor", lambda: True)
    preflight.require_training_grant()


REQUIRED = {"actor": ("autocast", "gradient")}


@pytest.fixture
def alone(planned: Ledger, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A process that no driver asks."""
    monkeypatch.setattr(preflight, "inside_ray_actor", lambda: False)
    return planned


def test_a_process_that_checks_itself_steps_once_it_has_computed_as_planned(alone: Ledger) -> None:
    preflight.check_itself(None, "verl", REQUIRED)
    alone.note("actor", "autocast", "float16")
    with pytest.raises(PrecisionError, match="gradient +never seen"):
        preflight.require_training_grant()
    alone.note("actor", "gradient", "float32")
    preflight.require_training_grant()
    assert alone.kind == "worker"


def test_a_process_that_checks_itself_finds_another_dtype_now_and_then(alone: Ledger) -> None:
    preflight.check_itself(None, "verl", {})
    preflight.require_training_grant()
    alone.note("actor", "autocast", "bfloat16")
    for _ in range(activation.current_plan().ledger_every - 1):
        preflight.require_training_grant()
    with pytest.raises(PrecisionError, match="autocast +bfloat16 +float16"):
        preflight.require_training_grant()


def test_a_process_that_checks_itself_refuses_to_step_without_its_patches(
    alone: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "owed_patches", lambda framework, kind: (f"of-a-{framework}-{kind}",))
    preflight.check_itself(None, "verl", {})
    with pytest.raises(PrecisionError, match="patches not live: of-a-verl-worker"):
        preflight.require_training_grant()


@pytest.fixture
def second_rank(alone: Ledger, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store of a job of two ranks, of which this process is the second."""
    torch = pytest.importorskip("torch")
    from fp16_patch.runtime import torch_private

    store = torch.distributed.HashStore()
    answers = {"is_initialized": True, "get_world_size": 2, "get_rank": 1}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.distributed, name, partial(lambda value: value, answer))
    monkeypatch.setattr(torch_private, "job_store", lambda: store)
    monkeypatch.setattr(preflight, "ANSWER_TIMEOUT_S", 0.1)
    preflight.check_itself(None, "verl", {})
    return store


def test_ranks_without_a_driver_compute_once_each_has_told_its_plan(second_rank: Any) -> None:
    second_rank.set("fp16_patch/plan of rank 0", Plan().to_json())
    preflight.require_other_ranks()
    assert second_rank.check(["fp16_patch/plan of rank 1"])


def test_a_rank_that_is_not_live_is_named_by_the_others(second_rank: Any) -> None:
    with pytest.raises(PrecisionError, match="rank 0 .*no attestation: fp16_patch is not live there"):
        preflight.require_other_ranks()


def test_a_rank_under_another_plan_is_named_by_the_others(second_rank: Any) -> None:
    second_rank.set("fp16_patch/plan of rank 0", Plan(init_scale=2.0).to_json())
    with pytest.raises(PrecisionError, match="rank 0 .*another plan"):
        preflight.require_other_ranks()
