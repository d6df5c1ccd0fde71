"""Knows, on a learner's rank, how old the weights are that each of its tokens was sampled with.

Each rank counts for itself: it takes part in every update of the policy and in every broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp16_patch.mismatch.statistics.by_lag import UNKNOWN
from fp16_patch.openrlhf.config.arguments import get
from fp16_patch.runtime.weight_versions import WeightVersions

_SLOT = "_fp16_patch_versions"


class PolicyVersions(WeightVersions):
    """The versions of the policy that an `ActorPPOTrainer` trains, labelled with how many broadcasts came before.

    Engines count the broadcasts that they get. Both sides start from the same weights, or from a first broadcast.
    """

    def __init__(self) -> None:
        super().__init__()
        self._broadcasts = 0
        self.synced(0)

    @classmethod
    def of(cls, trainer: Any) -> PolicyVersions:
        """Return the trainer's, made at the first call."""
        versions: PolicyVersions | None = getattr(trainer, _SLOT, None)
        if versions is None:
            versions = cls()
            setattr(trainer, _SLOT, versions)
        return versions

    def broadcast(self) -> None:
        """Note that engines get the weights as they are now."""
        self._broadcasts += 1
        self.synced(self._broadcasts)


def broadcast_to_vllm(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`ActorPPOTrainer.broadcast_to_vllm`, this rank's part of a broadcast: count it."""
    PolicyVersions.of(trainer).broadcast()
    return wrapped(*args, **kwargs)


def now(trainer: Any) -> Mapping[str, int]:
    """Return the lag of each label for what was scored since the last update; empty where no sample can be old."""
    return PolicyVersions.of(trainer).lags() if get(trainer.strategy.args, "train.async_enable") else {}


def lags_of(items: Sequence[Any], lag_of_label: Mapping[str, int], mask: Tensor) -> Tensor:
    """Return the lag of each action, int64 of the mask's shape, on the host.

    What is not sampled has the lag of what is: so a sample of one age is of one lag.

    Args:
        items: OpenRLHF's `Experience`s of one sequence each, whose prompts may be `SampledPrompt`s.
        mask: of their actions, which start at the second token.
    """
    lags, sampled = torch.full(mask.shape, UNKNOWN), mask.cpu().bool()
    for row, item in enumerate(items):
        for start, count, label in _runs_of(item):
            lags[row, max(0, start - 1) : max(0, start - 1 + count)] = lag_of_label.get(str(label), UNKNOWN)
        if len(ages := lags[row][sampled[row]]):
            lags[row][~sampled[row]] = ages[0]
    return lags


def _runs_of(item: Any) -> Sequence[tuple[int, int, int]]:
    prompts = getattr(item, "prompts", None)
    return getattr(prompts[0], "runs", ()) if prompts else ()
