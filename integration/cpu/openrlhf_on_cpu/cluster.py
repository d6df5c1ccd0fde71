"""Ray's cluster: one of the run's own, with GPUs that are only declared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

# Arguments for `ray.init`, as JSON; OpenRLHF has no settings for them.
RAY_INIT = "OPENRLHF_ON_CPU_RAY_INIT"


def install() -> None:
    wrapt.register_post_import_hook(start_as_told, "ray")


def start_as_told(ray: ModuleType) -> None:
    wrapt.wrap_function_wrapper(ray, "init", init)


def init(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    told = json.loads(os.environ.get(RAY_INIT, "{}"))
    runtime_env = {**told.get("runtime_env", {}), **(kwargs.get("runtime_env") or {})}
    return wrapped(*args, **{**told, **kwargs, "runtime_env": runtime_env})
