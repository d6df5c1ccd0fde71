"""Knows, on a learner's rank, how old the weights are that each of its tokens was sampled with.

Each rank counts for itself: it takes part in every update of the policy and in every sync.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.by_lag import MOST_LAG, UNKNOWN
from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.weight_versions import WeightVersions
from fp16_patch.verl.samplers.weight_versions import RUNS

_FIRST, _LAST = "min_global_steps", "max_global_steps"
# Where the V1 trainer keeps what the V0 trainer has as columns.
_FIELDS = "extra_fields"


versions = WeightVersions()
"""Of the policy that this process trains."""


async def update_weights(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`ActorRolloutRefWorker.update_weights`, this rank's part of a sync: note under which label the weights go out."""
    versions.synced(argument(wrapped, args, kwargs, "global_steps"))
    return await wrapped(*args, **kwargs)


def now(ahead: bool, restored: bool) -> Mapping[str, int]:
    """Return the lag of each label for a pass of this moment; empty where no sample can be old.

    Args:
        ahead, restored: as in `Order`.
    """
    return versions.lags(restored=restored) if ahead else {}


def lags_of(data: Any, lag_of_label: Mapping[str, int], lengths: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Return the lag of each token of the responses, int8 (sequences, longest response), on the host.

    A response's padding has the lag of its end, and what a tool has answered between two turns that of both, if they
    are alike.

    Args:
        data: the rank's batch, a TensorDict.
        lag_of_label: as the driver told, see `WeightVersions.lags`.
        lengths: tokens of each response, int64 on the host.
        prompt_lengths: tokens of each prompt, likewise.
    """
    lags = torch.full((len(lengths), int(lengths.max())), UNKNOWN, dtype=torch.int8)
    lag_of_label = {label: min(lag, MOST_LAG) for label, lag in lag_of_label.items()}
    for row, fields in enumerate(_fields_of(data, len(lengths))):
        length, prompt = int(lengths[row]), int(prompt_lengths[row])
        runs = [(start - prompt, count, lag_of_label.get(str(label), UNKNOWN)) for start, count, label in _runs(fields)]
        inside = [run for run in runs if run[0] + run[1] > 0] or [(0, length, _whole(fields, lag_of_label))]
        for start, count, lag in inside:
            lags[row, max(0, start) : start + count] = lag
        # Neither was sampled, and a row of one lag is measured at once.
        for (start, count, lag), (following, _, other) in pairwise(inside):
            if lag == other:
                lags[row, max(0, start + count) : following] = lag
        lags[row, length:] = lags[row, length - 1] if length else UNKNOWN
    return lags


def _runs(fields: Mapping[str, Any]) -> list[list[Any]]:
    noted = fields.get(RUNS)
    return noted["runs"] if noted else []


def _whole(fields: Mapping[str, Any], lag_of_label: Mapping[str, int]) -> int:
    """Return the lag of a trajectory of which no runs were noted: known if it spans no sync."""
    first, last = fields.get(_FIRST), fields.get(_LAST)
    return lag_of_label.get(str(first), UNKNOWN) if first is not None and first == last else UNKNOWN


def _fields_of(data: Any, rows: int) -> Iterator[Mapping[str, Any]]:
    keys = set(data.keys())
    if _FIELDS in keys:
        yield from (fields or {} for fields in _column(data, _FIELDS, rows))
        return
    columns = {name: _column(data, name, rows) for name in (RUNS, _FIRST, _LAST) if name in keys}
    for row in range(rows):
        yield {name: column[row] for name, column in columns.items()}


def _column(data: Any, name: str, rows: int) -> list[Any]:
    from verl.utils import tensordict_utils

    column = tensordict_utils.get(data, name)
    # A value that all rows share may stand for itself.
    return list(column) if isinstance(column, list) else [column] * rows
