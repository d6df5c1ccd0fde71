"""Hooks into verl's clients of samplers: note for each sampled token under which label its weights were synced.

verl keeps the first and the last label of a trajectory. One that spans a sync would have an unknown lag, and it is the
very kind that asynchronous training makes.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

RUNS = "fp16_patch_versions"
"""In a trajectory's `extra_fields`: {"runs": [[start, tokens, label], …]}, starts counted from the prompt's."""

# A trajectory is one task of an agent loop, and all of its turns add to one object, the one that its first turn has
# handed on: of later turns, agent loops take over what verl knows only. No list: numpy would take it for a dimension.
_trajectory: ContextVar[dict[str, list[list[Any]]] | None] = ContextVar("fp16_patch_trajectory", default=None)


async def generate(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    """`LLMServerClient.generate`, one request to one server: note the label that the server had when it was done.

    A server's weights change only while it has no request: a sync aborts them first.
    """
    output = await wrapped(*args, **kwargs)
    runs = _runs_from(len(kwargs["prompt_ids"]))
    if output.token_ids:
        runs.append([len(kwargs["prompt_ids"]), len(output.token_ids), output.extra_fields.get("global_steps")])
    output.extra_fields[RUNS] = _trajectory.get()
    return output


async def resumed_generate(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    """`FullyAsyncLLMServerClient.generate`, which goes on after each abort: hand on what its requests have noted."""
    output = await wrapped(*args, **kwargs)
    output.extra_fields[RUNS] = _trajectory.get()
    return output


def _runs_from(start: int) -> list[list[Any]]:
    """Return the runs of the trajectory that is at this many tokens: a conversation only grows."""
    trajectory = _trajectory.get()
    if trajectory is None or (trajectory["runs"] and start < sum(trajectory["runs"][-1][:2])):
        trajectory = {"runs": []}
        _trajectory.set(trajectory)
    return trajectory["runs"]
