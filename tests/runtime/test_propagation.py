from __future__ import annotations

import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fp16_patch import Plan
from fp16_patch.plan.plan import MODE_ENV, PLAN_ENV, SPOOL_ENV, TOLD_ENV
from fp16_patch.runtime import propagation
from fp16_patch.runtime.ledger import Ledger


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    propagation.stop_carrying()
    propagation._expected_children.clear()
    os.environ.pop(SPOOL_ENV, None)


def test_a_runtime_environment_is_extended_and_not_replaced() -> None:
    propagation.carry(Plan(init_scale=8.0))
    theirs = {"working_dir": "/job", "env_vars": {"NCCL_DEBUG": "INFO"}}
    extended = propagation.with_carried_environment(theirs)
    assert extended["working_dir"] == "/job"
    assert extended["env_vars"]["NCCL_DEBUG"] == "INFO"
    assert Plan.from_json(extended["env_vars"][PLAN_ENV]) == Plan(init_scale=8.0)
    assert theirs == {"working_dir": "/job", "env_vars": {"NCCL_DEBUG": "INFO"}}


def test_nothing_is_carried_without_a_plan() -> None:
    assert propagation.with_carried_environment({"env_vars": None}) == {"env_vars": {}}


def test_deactivating_gives_children_the_environment_this_process_had() -> None:
    propagation.carry(Plan())
    assert os.environ[MODE_ENV] == "fp16"
    propagation.stop_carrying()
    assert MODE_ENV not in os.environ
    assert PLAN_ENV not in os.environ


def test_a_child_leaves_its_record_with_the_parent_that_expects_it() -> None:
    propagation.expect_children({"engine_core": 1})
    record = Ledger(kind="engine_core").record(Plan(), {})
    publish = f"from fp16_patch.runtime import propagation; propagation.publish({record!r})"
    subprocess.run([sys.executable, "-c", publish], check=True)
    assert propagation.children() == [record]
    assert propagation.expected_children() == {"engine_core": 1}


def test_a_forked_child_is_not_taken_for_its_parent() -> None:
    propagation.expect_children({"engine_core": 1})
    record = Ledger(kind="engine_core").record(Plan(), {})
    child = os.fork()
    if child == 0:
        propagation.publish({**record, "pid": os.getpid()})
        os._exit(0)
    os.waitpid(child, 0)
    assert [left["pid"] for left in propagation.children()] == [child]


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"text"',
        '{"runtime_env": "x"}',
        '{"runtime_env": {"env_vars": [1, 2]}}',
        "[" * 100_000,
    ],
    ids=range(9),
)
def test_a_job_configuration_that_is_not_rays_breaks_no_start(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    propagation.carry(Plan())
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
    told: dict[str, Any] = {}
    propagation._ray_init(lambda **kwargs: told.update(kwargs), None, (), {})
    assert told["runtime_env"]["env_vars"][MODE_ENV] == "fp16"


def test_what_the_submitted_job_has_set_is_not_told_to_ray_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"FP16_PATCH": "1"}}}')
    propagation.carry(Plan())
    told: dict[str, Any] = {}
    propagation._ray_init(lambda **kwargs: told.update(kwargs), None, (), {})
    assert MODE_ENV not in told["runtime_env"]["env_vars"]
    assert PLAN_ENV in told["runtime_env"]["env_vars"]


def test_publishing_without_a_parent_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    propagation.publish(Ledger().record(Plan(), {}))
    assert list(tmp_path.iterdir()) == []


def told_to_an_actor(**options: Any) -> dict[str, Any]:
    """What Ray gets when an actor is created with these options."""
    told: dict[str, Any] = {}
    propagation._actor_remote(lambda **given: told.update(given), None, (), options)
    return told


def test_an_actor_is_told_a_plan_made_here_and_keeps_its_own_options() -> None:
    pytest.importorskip("ray")
    assert told_to_an_actor(num_cpus=1) == {"num_cpus": 1}
    propagation.carry(Plan(init_scale=8.0))
    told = told_to_an_actor(num_cpus=1, runtime_env={"env_vars": {"NCCL_DEBUG": "INFO"}})
    assert told["num_cpus"] == 1
    assert told["runtime_env"]["env_vars"]["NCCL_DEBUG"] == "INFO"
    assert Plan.from_json(told["runtime_env"]["env_vars"][PLAN_ENV]) == Plan(init_scale=8.0)


def test_an_inherited_plan_is_no_news_until_it_is_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with monkeypatch.context() as inherited:
        inherited.setitem(propagation._inherited, MODE_ENV, "fp16")
        inherited.setitem(propagation._inherited, PLAN_ENV, Plan().to_json())
        inherited.setitem(propagation._inherited, TOLD_ENV, "{}")
        propagation.carry(Plan())
        assert told_to_an_actor() == {}
        propagation.carry(Plan(init_scale=8.0))
        variables = told_to_an_actor()["runtime_env"]["env_vars"]
    assert Plan.from_json(variables[PLAN_ENV]) == Plan(init_scale=8.0)


@pytest.mark.parametrize("wrapped", ["init", "ActorClass._remote"])
def test_what_is_added_to_rays_calls_stops_none_of_them_where_the_plan_observes(
    wrapped: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("ray")
    told: list[Any] = []

    class ActorClass:
        def _remote(self, **options: Any) -> str:
            told.append(options)
            return "created"

    def init(**options: Any) -> str:
        told.append(options)
        return "connected"

    ray, actor = ModuleType("ray"), ModuleType("ray.actor")
    ray.init, actor.ActorClass = init, ActorClass  # type: ignore[attr-defined]
    propagation._wrap_ray_init(ray)
    propagation._wrap_actor_creation(actor)
    call = ray.init if wrapped == "init" else ActorClass()._remote  # type: ignore[attr-defined]

    propagation.carry(Plan(mode="observe"))
    assert call(runtime_env={})
    assert PLAN_ENV in told.pop()["runtime_env"]["env_vars"]
    assert call(runtime_env=7)
    assert told == [{"runtime_env": 7}]
    assert "the run goes on without it" in caplog.text
    propagation.carry(Plan())
    with pytest.raises(TypeError) as failed:
        call(runtime_env=7)
    assert "what adds the plan to" in "".join(traceback.format_exception(failed.value))
    assert told == [{"runtime_env": 7}]


def test_a_forked_child_that_ends_leaves_its_parents_folder() -> None:
    propagation.expect_children({"engine_core": 1})
    folder = Path(os.environ[SPOOL_ENV].partition(":")[2])
    child = os.fork()
    if child == 0:
        propagation._remove_folder()  # as at its exit
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()
    # Whoever still has the old folder's name says nothing there.
    child = os.fork()
    if child == 0:
        try:
            shutil.rmtree(folder)
            propagation.publish(Ledger().record(Plan(), {}))
        finally:
            os._exit(int(folder.exists()))
    assert os.waitpid(child, 0)[1] == 0
