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
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

from fp16_patch.plan.dtypes import FLOAT32
from fp16_patch.plan.plan import DRIVER_ENV, MODE_ENV, PLAN_ENV, SPOOL_ENV, Plan
from fp16_patch.runtime.gemm_sums import IEEE_ENVIRONMENT
from fp16_patch.runtime.ledger import Record

logger = logging.getLogger(__name__)

# Without its frameworks' plugin settings a carried plan would not be picked up on another machine.
_PLUGINS = ("VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS", "VLLM_PLUGINS")
_MADE_HERE = (MODE_ENV, PLAN_ENV, DRIVER_ENV, *IEEE_ENVIRONMENT)
_CARRIED = (*_MADE_HERE, *_PLUGINS)

_inherited = {name: os.environ.get(name) for name in _CARRIED}
_hooked = False
_expected_children: dict[str, int] = {}
_kept_children: list[Record] = []


def carry(plan: Plan) -> None:
    """Give `plan` to every process started from here on."""
    os.environ[MODE_ENV] = plan.mode
    os.environ[PLAN_ENV] = plan.to_json()
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
    """Return the attestation of the process that launched the job; None when that was not patched."""
    carried = os.environ.get(DRIVER_ENV)
    return None if carried is None else json.loads(carried)


def stop_carrying() -> None:
    """Give processes started from here on what this one was started with."""
    _restore(_MADE_HERE)


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
        value = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    except (ValueError, RecursionError):
        return set()
    for key in ("runtime_env", "env_vars"):
        value = value.get(key) if isinstance(value, dict) else None
    return set(value) if isinstance(value, dict) else set()


def _hook_ray() -> None:
    global _hooked
    if _hooked:
        return
    _hooked = True
    wrapt.register_post_import_hook(_wrap_ray_init, "ray")
    wrapt.register_post_import_hook(_wrap_actor_creation, "ray.actor")


def _wrap_ray_init(ray: ModuleType) -> None:
    wrapt.wrap_function_wrapper(ray, "init", _ray_init)


def _wrap_actor_creation(actor: ModuleType) -> None:
    wrapt.wrap_function_wrapper(actor, "ActorClass._remote", _actor_remote)


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
    spool = tempfile.mkdtemp(prefix="fp16_patch_")
    atexit.register(shutil.rmtree, spool, ignore_errors=True)
    # The owner's pid goes with it: a child that is forked inherits everything else.
    os.environ[SPOOL_ENV] = f"{os.getpid()}:{spool}"
    _expected_children.clear()
    _expected_children.update(counts)


def expected_children() -> dict[str, int]:
    """Return how many child processes of each kind must attest."""
    return dict(_expected_children) if _spool()[0] == os.getpid() else {}


def _spool() -> tuple[int | None, Path]:
    owner, _, spool = os.environ.get(SPOOL_ENV, "").partition(":")
    return int(owner) if owner else None, Path(spool)


def children() -> list[Record]:
    """Return the records this process's children have left, or that were fetched from them."""
    owner, spool = _spool()
    paths = sorted(spool.glob("*.json")) if owner == os.getpid() else []
    left = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    # What was fetched is of now, what was left is of the last change.
    return [*({(record["host"], record["pid"]): record for record in [*left, *_kept_children]}.values())]


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
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(path)
