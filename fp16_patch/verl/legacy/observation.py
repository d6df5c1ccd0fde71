"""The legacy actor's ranks observe the mismatch where they compute the log-probs of the tokens just sampled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fp16_patch.mismatch.collection import rank
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan
from fp16_patch.verl.trainers.observation import ORDER, Order


def compute_log_prob(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> Any:
    """`DataParallelPPOActor.compute_log_prob`: compare both sides' log-probs, where the driver ordered it."""
    data = argument(wrapped, args, kwargs, "data")
    order = data.meta_info.get(ORDER)
    outputs = wrapped(*args, **kwargs)
    if order is None or "rollout_log_probs" not in data.batch.keys():  # noqa: SIM118, it iterates over rows
        return outputs
    # These workers' samples are never older than their weights.
    run, number, rescore, *_ = Order(*json.loads(order))
    learner = _log_probs_of(outputs)
    floor = _noise_floor(wrapped, data, learner) if rescore else None
    # Ranks of one sequence-parallel group have the same sequences.
    parallel = actor.ulysses_sequence_parallel_size
    index, size = torch.distributed.get_rank() // parallel, torch.distributed.get_world_size() // parallel
    if torch.distributed.get_rank() % parallel == 0:
        first = index * len(data)
        rank.observe(run, index, size, number, lambda: (_compare(data, learner, first), {}), floor)
    return outputs


def _log_probs_of(outputs: Any) -> Tensor:
    # A dictionary since 0.7.1, a pair with the entropy before.
    return outputs["log_probs"] if isinstance(outputs, Mapping) else outputs[0]


def _compare(data: Any, learner: Tensor, first_sequence: int) -> MismatchStats:
    sampler, mask, tokens = (
        data.batch[name].to(learner.device, non_blocking=True)
        for name in ("rollout_log_probs", "response_mask", "responses")
    )
    stats: MismatchStats = MismatchStats.from_log_probs(
        sampler, learner, mask, token_ids=tokens, first_sequence=first_sequence
    )
    return stats


def _noise_floor(score: Callable[..., Any], data: Any, together: Tensor) -> MismatchStats | None:
    """Compare the learner with itself: score a few sequences once more, each alone."""

    def choose() -> tuple[list[int], Any] | None:
        dynamic, size = data.meta_info.get("use_dynamic_bsz", False), data.meta_info["micro_batch_size"]
        if not dynamic and size <= 1:
            return None
        rows = rank.rows_to_rescore(len(data), current_plan().noise_floor_share)
        alone = data[rows]
        alone.meta_info = {**data.meta_info, "use_dynamic_bsz": False, "micro_batch_size": 1}
        return rows, alone

    def compare(chosen: tuple[list[int], Any]) -> MismatchStats:
        rows, alone = chosen
        again = _log_probs_of(score(data=alone, calculate_entropy=False))
        mask = alone.batch["response_mask"].to(again.device, non_blocking=True)
        stats: MismatchStats = MismatchStats.from_log_probs(again, together[rows], mask)
        return stats

    return rank.noise_floor(choose, compare)
