"""A fork whose sampler drops weights that it was sent, in the process that comes first; verl imports this in each."""

import contextlib
import os
from pathlib import Path

import wrapt

# The first sync comes before training: from the next one on, this sampler stays at the initial policy.
KEPT = 1


def drop_later_syncs(utils):
    syncs = 0

    def update_weights(wrapped, worker, args, kwargs):
        nonlocal syncs
        syncs += 1
        if syncs <= KEPT or not _drops():
            wrapped(*args, **kwargs)

    # One bucket holds all weights of a tiny model.
    wrapt.wrap_function_wrapper(utils, "vLLMColocateWorkerExtension._update_weights", update_weights)


def _drops():
    """Return whether this is the process that drops them: the first that left its number in a file."""
    mine, first = str(os.getpid()), Path(os.environ["DROPPED_SYNC"])
    with contextlib.suppress(FileExistsError), first.open("x") as file:
        file.write(mine)
    return first.read_text() == mine


wrapt.register_post_import_hook(drop_later_syncs, "verl.workers.rollout.vllm_rollout.utils")
