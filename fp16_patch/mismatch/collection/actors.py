"""The monitor's Ray actors by name: where they run, and how they are found.

None is detached: all end with the job. An aggregator ends with the rank that created it, too; the next rank of that
node that reports creates it again under the same name.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMESPACE = "fp16_patch"
UNLIMITED = -1
ROOT_RETRIES = 3
"""What is asked of a restarting root is asked again: no question to it does harm when asked twice."""

MAX_PENDING_CALLS = 16
"""Calls that one rank may leave with an aggregator that does not answer."""


def job_run() -> str:
    """The run's name where workers cannot be told one: every process of the Ray job derives the same.

    Raises:
        RuntimeError: this process is not connected to Ray.
    """
    import ray

    if not ray.is_initialized():
        raise RuntimeError("Ray is not initialized in this process")
    return str(ray.get_runtime_context().get_job_id())


def new_run() -> str:
    """A name that no other run has, of another trainer in the same job included.

    Raises:
        RuntimeError: this process is not connected to Ray.
    """
    return f"{job_run()}-{uuid.uuid4().hex[:8]}"


def root_name(run: str) -> str:
    return f"{run}/root"


def node_prefix(run: str) -> str:
    return f"{run}/node/"


def root_of(run: str, out_dir: Path, sinks: tuple[str, ...] = ()) -> Any:
    """The run's root, created on this node if there is none."""
    import ray

    from fp16_patch.mismatch.collection.root import Root

    options = _options(root_name(run), max_task_retries=ROOT_RETRIES)
    return ray.remote(Root).options(**options).remote(run, str(out_dir), sinks)


def aggregator_here(run: str) -> Any:
    """The run's aggregator on this node, created if there is none."""
    import ray

    from fp16_patch.mismatch.collection.aggregator import Aggregator

    name = node_prefix(run) + ray.get_runtime_context().get_node_id()
    options = _options(name, max_task_retries=0, max_pending_calls=MAX_PENDING_CALLS)
    return ray.remote(Aggregator).options(**options).remote()


def aggregators_of(run: str, known: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Name → handle of the run's aggregators on all nodes: one question to the cluster, and one for each unknown."""
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


def _options(name: str, **options: Any) -> dict[str, Any]:
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
