"""Hooks into verl's SGLang servers: judges what became of their arguments, and expects their children to attest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from fp16_patch.patching.call_arguments import argument
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.activation import current_plan
from fp16_patch.sglang import SCHEDULER
from fp16_patch.sglang.sampler import CONVOLUTIONS, JUDGES
from fp16_patch.verl.samplers.server import begin_server

SERVER = "sglang_server"


def set_envs_and_config(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`_set_envs_and_config`, an SGLang server's last call before it starts its schedulers: expect them to attest.

    SGLang has settled its arguments by now: for some models and machines, in another dtype than it was told.

    Raises:
        PlanError: the settled arguments are not the plan's.
    """
    arguments = argument(wrapped, args, kwargs, "server_args")
    plan = current_plan()
    if plan.overrides_dtype:
        if conflicts := list(_settled_conflicts(arguments, plan)):
            raise PlanError(conflicts)
        os.environ[CONVOLUTIONS] = str(plan.dtype)
    begin_server(SERVER, {SCHEDULER: _schedulers_of(arguments)})
    return wrapped(*args, **kwargs)


def _settled_conflicts(arguments: Any, plan: Plan) -> Iterator[Conflict]:
    for name, judge in JUDGES.items():
        value = getattr(arguments, name, None)
        if reason := judge(value, plan):
            said = f"SGLang starts with it, told so or settled on it for this model and machine, and {reason}"
            yield Conflict(f"SGLang's {name}", value, said, _FIX)


_FIX = (
    "set another below actor_rollout_ref.rollout.engine_kwargs.sglang, if this model has one, or FP16_PATCH=observe to "
    "measure without changing"
)


def _schedulers_of(arguments: Any) -> int:
    """Return how many schedulers a server with these arguments starts on its node: one for each rank of the model."""
    # With attention in data parallel, the replicas are ranks of the same group.
    replicas = 1 if arguments.enable_dp_attention else arguments.dp_size
    return int(arguments.tp_size * arguments.pp_size * replicas // arguments.nnodes)
