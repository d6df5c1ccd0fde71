"""What verl's servers have in common: what they are for, and the children that they expect to attest."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fp16_patch.plan.plan import ROLE_ENV
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import ledger

_ROLES = ("reward", "teacher")


def begin_server(kind: str, children: Mapping[str, int]) -> None:
    """Say what this process is and samples for, as its children will, and expect these to attest."""
    ledger().kind = kind
    os.environ[ROLE_ENV] = _role_of_this_server()
    propagation.expect_children(children)


def _role_of_this_server() -> str:
    # Nothing tells the server what it is for, but the name verl gives its actor.
    name = _actor_name()
    return next((role for role in _ROLES if f"server_{role}" in name), "rollout")


def _actor_name() -> str:
    import ray

    return str(ray.get_runtime_context().get_actor_name() or "")
