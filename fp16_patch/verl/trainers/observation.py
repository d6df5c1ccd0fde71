"""Observes the mismatch on the learner's ranks, where they compute the log-probs of the tokens just sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp16_patch.mismatch.collection import rank
from fp16_patch.mismatch.statistics.by_lag import Lags, measure_by_lag
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan
from fp16_patch.verl.fsdp.engine import role_of
from fp16_patch.verl.trainers import lags

# Rides in the batch from the driver to the ranks, as JSON: an `Order`.
ORDER = "fp16_patch_observe"
# On an engine: the run and the pass that its updates were observed for last.
_OBSERVED = "_fp16_patch_observed"


class Order(NamedTuple):
    """What the driver tells the ranks about the pass that it rides with.

    Attributes:
        number: the round.
        rescores: whether to measure the learner against itself.
        number_of_pass: tells the passes of a round apart.
        ahead: samples may have been drawn with older weights than the learner's.
        restored: the learner has, for this pass, the weights that samplers got last.
    """

    run: str
    number: int
    rescores: bool
    number_of_pass: int
    ahead: bool
    restored: bool


def infer_batch(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`BaseEngine.infer_batch`: compare sampler and learner log-probs in place, where the driver ordered it."""
    data = argument(wrapped, args, kwargs, "data")
    order = take_order(data)
    outputs = wrapped(*args, **kwargs)
    if order is None or role_of(engine) != "actor":
        return outputs
    floor = _noise_floor(wrapped, data, outputs) if order.rescores else None
    observe(engine, order, data, outputs, lags.now(order.ahead, order.restored), floor)
    return outputs


def order_for_update(engine: Any, data: Any) -> Order | None:
    """Take the driver's order out of a mini-batch; None but for the first of an actor's update.

    Its log-probs are those before any step of the update; of later ones they are other weights'.
    """
    from verl.utils import tensordict_utils

    order = take_order(data)
    if order is None or role_of(engine) != "actor":
        return None
    this = order.run, order.number_of_pass
    if getattr(engine, _OBSERVED, None) == this:
        return None
    setattr(engine, _OBSERVED, this)
    # From 0.9.0 on engines keep no log-probs of what they train on, unless told.
    tensordict_utils.assign_non_tensor(data, return_model_output=True)
    return order


def observe(
    engine: Any,
    order: Order,
    data: Any,
    outputs: Mapping[str, Any],
    lag_of_label: Mapping[str, int],
    floor: MismatchStats | None = None,
) -> None:
    """Compare sampler and learner in a pass over samples, and report what this rank has of it.

    Args:
        lag_of_label: as of the pass, see `lags.now`.
    """
    log_probs = outputs.get("model_output", {}).get("log_probs")
    if log_probs is not None and engine.is_mp_src_rank_with_outputs():
        index, size = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
        first = index * len(data)
        measure = partial(_compare, data, log_probs.detach(), first, lag_of_label)
        rank.observe(order.run, index, size, order.number, measure, floor)


def response_log_probs(log_probs: Tensor, lengths: Tensor, sequence_lengths: Tensor) -> Tensor:
    """Cut the sampled tokens' part out of a model's log-probs, padded with 0.

    Args:
        log_probs: jagged, one row a sequence of prompt and response; the entry at t is of the token at t + 1.
        lengths: tokens of each response, int64 on the host.
        sequence_lengths: tokens of each prompt and response, int64 on the host.

    Returns:
        Shape (sequences, longest response), on the device of ``log_probs``. Made without waiting for it.
    """
    positions = torch.arange(int(lengths.max()))
    first = sequence_lengths.cumsum(0) - lengths - 1
    inside = positions < lengths[:, None]
    index = torch.where(inside, first[:, None] + positions, 0)
    values = log_probs.values()
    picked = values[index.to(values.device, non_blocking=True)]
    return picked.masked_fill(~inside.to(values.device, non_blocking=True), 0.0)


def take_order(data: Any) -> Order | None:
    """Take the driver's order out of the data; None for a pass that is not over freshly sampled tokens."""
    from verl.utils import tensordict_utils

    order = tensordict_utils.pop(data, key=ORDER, default=None)
    if order is None or "rollout_log_probs" not in data.keys():  # noqa: SIM118, a TensorDict iterates over its rows
        return None
    return Order(*json.loads(order))


def _compare(
    data: Any, log_probs: Tensor, first_sequence: int, lag_of_label: Mapping[str, int]
) -> tuple[MismatchStats, Lags]:
    lengths, sequence_lengths = _lengths(data)
    learner = response_log_probs(log_probs, lengths, sequence_lengths)
    sampler, mask, tokens = (
        _padded(data[name], learner.shape[1]).to(learner.device, non_blocking=True)
        for name in ("rollout_log_probs", "response_mask", "responses")
    )
    if not lag_of_label:
        return MismatchStats.from_log_probs(sampler, learner, mask, token_ids=tokens, first_sequence=first_sequence), {}
    of_tokens = lags.lags_of(data, lag_of_label, lengths, sequence_lengths - lengths)
    return measure_by_lag(sampler, learner, mask, of_tokens, tokens, first_sequence)


def _lengths(data: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens of each response and of each whole sequence, on the host."""
    sequences, responses = data["input_ids"].offsets().diff(), data["responses"]
    if responses.is_nested:
        return responses.offsets().diff().cpu(), sequences.cpu()
    # The V0 trainer pads responses on the right.
    return data["attention_mask"][:, -responses.shape[1] :].sum(dim=1).cpu(), sequences.cpu()


def _padded(values: Tensor, width: int) -> Tensor:
    padded = values.to_padded_tensor(0) if values.is_nested else values
    return padded[:, :width]


def _noise_floor(infer: Any, data: Any, outputs: Any) -> MismatchStats | None:
    """Measure the learner against itself: a few sequences are scored once more, each alone."""
    from verl.utils import tensordict_utils

    def choose() -> tuple[list[int], Any] | None:
        if not _scored_in_batches(data):
            return None
        rows = rank.rows_to_rescore(len(data), current_plan().noise_floor_share)
        alone = tensordict_utils.index_select_tensor_dict(data, rows)
        tensordict_utils.assign_non_tensor(
            alone, use_dynamic_bsz=False, micro_batch_size_per_gpu=1, calculate_entropy=False
        )
        return rows, alone

    def score(chosen: tuple[list[int], Any]) -> MismatchStats | None:
        rows, alone = chosen
        again = infer(alone)["model_output"].get("log_probs")
        if again is None:
            return None
        return _compare_with_itself(data, alone, outputs["model_output"]["log_probs"], again, rows)

    return rank.noise_floor(choose, score)


def _scored_in_batches(data: Any) -> bool:
    """Return whether sequences were scored several at a time: after one alone, scoring it alone says nothing."""
    from verl.utils import tensordict_utils

    dynamic = tensordict_utils.get_non_tensor_data(data, key="use_dynamic_bsz", default=True)
    return bool(dynamic) or tensordict_utils.get_non_tensor_data(data, key="micro_batch_size_per_gpu", default=1) > 1


def _compare_with_itself(data: Any, alone: Any, together: Tensor, again: Tensor, rows: list[int]) -> MismatchStats:
    lengths, sequence_lengths = _lengths(data)
    first = response_log_probs(together, lengths, sequence_lengths)[rows]
    second = response_log_probs(again, lengths[rows], sequence_lengths[rows])
    mask = _padded(alone["response_mask"], second.shape[1]).to(first.device, non_blocking=True)
    stats: MismatchStats = MismatchStats.from_log_probs(second, first[:, : second.shape[1]], mask)
    return stats
