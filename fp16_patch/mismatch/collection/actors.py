"""The names of the monitor's Ray actors: how they are found, and with which options they are created.

None is detached: all end with the job. An aggregator ends with the rank that created it, too; the next rank of that
node that reports creates it again under the same name.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from typing import Any

NAMESPACE = "fp16_patch"
UNLIMITED = -1


def job_run() -> str:
    """Name the run where workers cannot be told a name: every process of the Ray job derives the same.

    Raises:
        RuntimeError: this process is not connected to Ray.
    """
    import ray

    if not ray.is_initialized():
        raise RuntimeError("Ray is not initialized in this process")
    return str(ray.get_runtime_context().get_job_id())


def new_run() -> str:
    """Make a name that no other run has, not even that of another trainer in the same job.

    Raises:
        RuntimeError: this process is not connected to Ray.
    """
    return f"{job_run()}-{uuid.uuid4().hex[:8]}"


def root_name(run: str) -> str:
    return f"{run}/root"


def node_prefix(run: str) -> str:
    return f"{run}/node/"


def aggregators_of(run: str, known: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Find the run's aggregators on all nodes, name → handle: one question to the cluster, and one for each unknown."""
    import ray
    from ray.util import list_named_actors

    prefix = node_prefix(run)
    actors = list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    found = {}
    for name in names:
        if name.startswith(prefix):
            # One that dies meanwhile is not found any more.
            with contextlib.suppress(ValueError):
                found[name] = known.get(name) or ray.get_actor(name, NAMESPACE)
    return found


def options_here(name: str, **options: Any) -> dict[str, Any]:
    """Return Ray's options for an actor of that name on this node: the one that is there, or a new one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {
        "name": name,
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": UNLIMITED,
        # An explicit strategy also keeps the actor out of its creator's placement group.
        "scheduling_strategy": here,
        **options,
    }
