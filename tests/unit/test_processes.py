from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp16_patch import Plan, processes
from fp16_patch.ledger import Ledger
from fp16_patch.plan import MODE_ENV, PLAN_ENV


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    processes.stop_carrying()
    processes._expected_children.clear()
    os.environ.pop(processes.SPOOL_ENV, None)


def test_a_runtime_environment_is_extended_and_not_replaced() -> None:
    processes.carry(Plan(init_scale=8.0))
    theirs = {"working_dir": "/job", "env_vars": {"NCCL_DEBUG": "INFO"}}
    extended = processes.with_carried_environment(theirs)
    assert extended["working_dir"] == "/job"
    assert extended["env_vars"]["NCCL_DEBUG"] == "INFO"
    assert Plan.from_json(extended["env_vars"][PLAN_ENV]) == Plan(init_scale=8.0)
    assert theirs == {"working_dir": "/job", "env_vars": {"NCCL_DEBUG": "INFO"}}


def test_nothing_is_carried_without_a_plan() -> None:
    assert processes.with_carried_environment({"env_vars": None}) == {"env_vars": {}}


def test_deactivating_gives_children_the_environment_this_process_had() -> None:
    processes.carry(Plan())
    assert os.environ[MODE_ENV] == "fp16"
    processes.stop_carrying()
    assert MODE_ENV not in os.environ
    assert PLAN_ENV not in os.environ


def test_a_child_leaves_its_record_with_the_parent_that_expects_it() -> None:
    processes.expect_children({"engine_core": 1})
    record = Ledger(kind="engine_core").record(Plan(), {})
    expected = dict(processes._expected_children)
    processes._expected_children.clear()  # as in the child, which inherits the environment only
    processes.publish(record)
    processes._expected_children.update(expected)
    assert processes.children() == [record]
    assert not list(Path(os.environ[processes.SPOOL_ENV]).glob("*.partial"))


def test_publishing_without_a_parent_is_nothing() -> None:
    processes.publish(Ledger().record(Plan(), {}))
    assert processes.children() == []
