"""Reaches every process: by the environment, Ray's runtime environment, and a folder for processes without Ray.

Out: the plan travels as an environment variable. Child processes inherit it; Ray's do where the cluster runs on this
machine or the job's runtime environment names it, so it is added to `ray.init` and to each actor we see created. In
each process an entry point (`autoload`) or the framework's own import of `fp16_patch.<framework>` activates it.

Back: the driver asks every Ray actor for its record (`preflight`). Processes that are no Ray actors, vLLM's EngineCore
and workers, leave theirs in a folder their server opened (`expect_children`, `publish`), and the server answers for
them. Then the driver allows each worker to step; one that was never allowed refuses (`require_training_grant`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

from fp16_patch.patching.guarded_hook import guarded
from fp16_patch.patching.import_hooks import when_imported
from fp16_patch.plan.dtypes import FLOAT32
from fp16_patch.plan.guard import OurPart
from fp16_patch.plan.plan import (
    DRIVER_ENV,
    MODE_ENV,
    PLAN_ENV,
    SPOOL_ENV,
    TOLD_ENV,
    Plan,
    told_in,
    unreadable_variable,
    words_in,
)
from fp16_patch.runtime.gemm_sums import IEEE_ENVIRONMENT
from fp16_patch.runtime.ledger import Record, is_record, missing_record
from fp16_patch.untrusted.reading import Unreadable, json_of, read_json

logger = logging.getLogger(__name__)

# Without its frameworks' plugin settings a carried plan would not be picked up on another machine.
_PLUGINS = ("VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS", "VLLM_PLUGINS", "SGLANG_PLUGINS")
_MADE_HERE = (MODE_ENV, PLAN_ENV, TOLD_ENV, DRIVER_ENV, *IEEE_ENVIRONMENT)
_CARRIED = (*_MADE_HERE, *_PLUGINS)

_SPOOL = re.compile(r"(\d{1,10}):(/[^\0]+)")

_inherited = {name: os.environ.get(name) for name in (*_CARRIED, SPOOL_ENV)}
_hooked = False
_carried: Plan | None = None
_told: dict[str, str] | None = None
_expected_children: dict[str, int] = {}
_kept_children: list[Record] = []
_folder: tuple[int, str] | None = None
"""Of the children's records: the process that made it, and its path."""
_removes_folder_at_exit = False


def carry(plan: Plan) -> None:
    """Give `plan` to every process started from here on, with the variables that it was made under.

    One of mode `off` is no more than that word: there is nothing to hold against another.
    """
    global _carried, _told
    if not plan.active:
        _restore(_MADE_HERE)
        os.environ.pop(PLAN_ENV, None)
        os.environ[MODE_ENV] = plan.mode
        return
    if _told is None:
        # Under a plan that was carried here, those are known.
        _told = (told_in if PLAN_ENV in os.environ else words_in)(os.environ)
    _carried = plan
    os.environ[MODE_ENV] = plan.mode
    os.environ[PLAN_ENV] = plan.to_json()
    os.environ[TOLD_ENV] = json.dumps(_told)
    if plan.dtype == FLOAT32.torch:
        _carry_ieee()
    else:
        _restore(name for name, value in IEEE_ENVIRONMENT.items() if os.environ.get(name) == value)
    _hook_ray()


def _carry_ieee() -> None:
    for name, value in IEEE_ENVIRONMENT.items():
        if os.environ.get(name, value) != value:
            logger.warning("%s: %s → %s, as TF32 has no more bits than float16", name, os.environ[name], value)
        os.environ[name] = value


def carry_driver_record(record: Record) -> None:
    """Give the launching process's attestation to the process that judges, which cannot ask for it."""
    os.environ[DRIVER_ENV] = json.dumps(record)


def driver_record() -> Record | None:
    """Return the attestation of the process that launched the job; None when that was not patched.

    Raises:
        PlanError: what was carried here is none.
    """
    carried = os.environ.get(DRIVER_ENV)
    if carried is None:
        return None
    try:
        record: Record = json_of(carried)
    except Unreadable as problem:
        raise unreadable_variable(DRIVER_ENV, carried, str(problem)) from None
    if not is_record(record):
        raise unreadable_variable(DRIVER_ENV, carried, "it is not the record of a process")
    return record


def check_carried() -> None:
    """Look at what was carried to this process, beside the plan.

    Raises:
        PlanError: a variable does not hold what another process of ours would have put there.
    """
    driver_record()
    _spool()


def stop_carrying() -> None:
    """Give processes started from here on what this one was started with, and expect no children."""
    global _carried, _told
    _carried = _told = None
    _restore((*_MADE_HERE, SPOOL_ENV))
    _expected_children.clear()
    _kept_children.clear()
    _remove_folder()


def _restore(names: Iterable[str]) -> None:
    for name in names:
        value = _inherited[name]
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def carried_environment() -> dict[str, str]:
    """Return the variables a new process needs to activate the same plan."""
    if PLAN_ENV not in os.environ:
        return {}
    return {name: os.environ[name] for name in _CARRIED if name in os.environ}


def with_carried_environment(runtime_env: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a Ray runtime environment with the plan added."""
    extended = dict(runtime_env or {})
    extended["env_vars"] = {**(extended.get("env_vars") or {}), **carried_environment()}
    return extended


def _submitted_names() -> set[str]:
    """Name the variables that `ray job submit` has set for the whole job; Ray refuses to be told them twice.

    What is not of Ray's form names none: whoever reads it next, Ray itself, says what is wrong with it.
    """
    try:
        value = json_of(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    except Unreadable:
        return set()
    for key in ("runtime_env", "env_vars"):
        value = value.get(key) if isinstance(value, dict) else None
    return set(value) if isinstance(value, dict) else set()


def _hook_ray() -> None:
    global _hooked
    if _hooked:
        return
    # Once a process: what is put there asks for the plan in force.
    _hooked = True
    when_imported("ray", _wrap_ray_init)
    when_imported("ray.actor", _wrap_actor_creation)


def _wrap_ray_init(ray: ModuleType) -> None:
    _wrap(ray, "init", _ray_init, "what adds the plan to ray.init")


def _wrap_actor_creation(actor: ModuleType) -> None:
    _wrap(actor, "ActorClass._remote", _actor_remote, "what adds the plan to a new Ray actor")


def _wrap(module: ModuleType, name: str, hook: Any, what: str) -> None:
    part = OurPart(logger, what, _only_observes)
    part.run(lambda: wrapt.wrap_function_wrapper(module, name, guarded(hook, part)))


def _only_observes() -> bool:
    return _carried is None or not _carried.overrides_dtype


def _ray_init(wrapped: Any, instance: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if carried_environment():
        extended = with_carried_environment(kwargs.get("runtime_env"))
        for name in _submitted_names() & carried_environment().keys():
            del extended["env_vars"][name]
        kwargs = {**kwargs, "runtime_env": extended}
    return wrapped(*args, **kwargs)


def _actor_remote(wrapped: Any, instance: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    # An actor inherits its creator's runtime environment; only a plan made or refined here is news to it.
    news = {name: value for name, value in carried_environment().items() if _inherited.get(name) != value}
    if news:
        from ray.runtime_env import RuntimeEnv

        # Past `.options()`, Ray takes no plain mapping any more.
        kwargs = {**kwargs, "runtime_env": RuntimeEnv(**with_carried_environment(kwargs.get("runtime_env")))}
    return wrapped(*args, **kwargs)


def expect_children(counts: Mapping[str, int]) -> None:
    """Open a fresh folder where child processes leave their records, and say how many of each kind there will be."""
    global _folder, _removes_folder_at_exit
    _remove_folder()
    spool = tempfile.mkdtemp(prefix="fp16_patch_")
    _folder = os.getpid(), spool
    if not _removes_folder_at_exit:
        _removes_folder_at_exit = True
        atexit.register(_remove_folder)
    # The owner's pid goes with it: a child that is forked inherits everything else.
    os.environ[SPOOL_ENV] = f"{os.getpid()}:{spool}"
    _expected_children.clear()
    _expected_children.update(counts)


def _remove_folder() -> None:
    global _folder
    # A forked child inherits the parent's exit handler, too.
    if _folder is not None and _folder[0] == os.getpid():
        shutil.rmtree(_folder[1], ignore_errors=True)
    _folder = None


def expected_children() -> dict[str, int]:
    """Return how many child processes of each kind must attest."""
    return dict(_expected_children) if _spool()[0] == os.getpid() else {}


def _spool() -> tuple[int | None, Path]:
    """Return who expects records, None if nobody does, and in which folder.

    Raises:
        PlanError: the variable holds something else.
    """
    carried = os.environ.get(SPOOL_ENV, "")
    if not carried:
        return None, Path()
    said = _SPOOL.fullmatch(carried)
    if said is None:
        raise unreadable_variable(SPOOL_ENV, carried, "it is not a process and a folder, as 123:/tmp/fp16_patch_x")
    return int(said[1]), Path(said[2])


def children() -> list[Record]:
    """Return the records this process's children have left, or that were fetched from them."""
    owner, spool = _spool()
    paths = sorted(spool.glob("*.json")) if owner == os.getpid() else []
    left = [_left_in(path) for path in paths]
    # What was fetched is of now, what was left is of the last change.
    return [*({(record["host"], record["pid"]): record for record in [*left, *_kept_children]}.values())]


def _left_in(path: Path) -> Record:
    try:
        record = read_json(path)
    except (OSError, Unreadable) as problem:
        return missing_record("process", f"the record that it left cannot be read: {problem}", path.stem)
    return record if is_record(record) else missing_record("process", "what it left is no record", path.stem)


def keep_children(records: Sequence[Record]) -> None:
    """Answer for these child processes too, in place of what was fetched of them before."""
    _kept_children[:] = records


def publish(record: Record) -> None:
    """Leave this process's record with its parent, if that expects one. A reader never sees half a file."""
    owner, spool = _spool()
    if owner in (None, os.getpid()) or not spool.is_dir():
        return
    path = spool / f"{record['pid']}.json"
    partial = path.with_suffix(".partial")
    # The folder goes with the parent, or with its plan.
    with contextlib.suppress(FileNotFoundError):
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(path)
