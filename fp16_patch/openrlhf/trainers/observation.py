"""Observes the mismatch on the learner's ranks, in what they are about to train on: both log-probs are there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fp16_patch.mismatch.collection import actors, rank
from fp16_patch.mismatch.statistics.by_lag import Lags, measure_by_lag
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.openrlhf.config.arguments import get
from fp16_patch.openrlhf.trainers import lags
from fp16_patch.runtime.activation import current_plan

# OpenRLHF's calls to a rank have no room for a message of ours, so driver and ranks count the rounds alike.
_ROUNDS = "_fp16_patch_rounds"


def observe_buffer(trainer: Any) -> None:
    """Observe the replay buffer of an `ActorPPOTrainer` that starts to train on it: a round each time."""
    number = getattr(trainer, _ROUNDS, 0)
    setattr(trainer, _ROUNDS, number + 1)
    if not current_plan().monitor:
        return
    # Outside of what may fail on one rank alone: every rank takes part in it.
    every = current_plan().noise_floor_every
    floor = _noise_floor(trainer) if every and number % every == 0 else None
    rank.guard.run(lambda: _observe(trainer, number, floor))


def _observe(trainer: Any, number: int, floor: MismatchStats | None) -> None:
    items = [item for item in trainer.replay_buffer.items if has_sampler_log_probs(item)]
    mesh = trainer.strategy.ds_device_mesh
    # Ranks that share sequences (ring attention, tensor parallelism) hold the same ones.
    if not items or any(mesh[name].get_local_rank() for name in ("sp", "tp")):
        return
    index, size = mesh["dp"].get_local_rank(), mesh["dp"].size()
    measure = partial(_compare_by_lag, items, index * len(items), lags.now(trainer))
    rank.observe(actors.job_run(), index, size, number, measure, floor)


def has_sampler_log_probs(experience: Any) -> bool:
    """Return whether an experience, or an item of the replay buffer, has the sampler's log-probs."""
    return getattr(experience, "rollout_log_probs", None) is not None


def _compare_by_lag(
    items: list[Any], first_sequence: int, lag_of_label: Mapping[str, int]
) -> tuple[MismatchStats, Lags]:
    """Compare the learner's log-probs with the sampler's.

    Args:
        lag_of_label: as of now, see `lags.now`: the learner's were computed with the weights that it still has.
    """
    sampler, learner, mask, tokens = _padded(items, "rollout_log_probs")
    if not lag_of_label:
        return MismatchStats.from_log_probs(sampler, learner, mask, token_ids=tokens, first_sequence=first_sequence), {}
    of_tokens = lags.lags_of(items, lag_of_label, mask)
    return measure_by_lag(sampler, learner, mask, of_tokens, tokens, first_sequence)


def _padded(items: list[Any], other: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return another field, the learner's log-probs, mask and ids of the actions, which start at the second token.

    Args:
        items: OpenRLHF's `Experience`s of one sequence each.
    """
    others, learner, mask, tokens = (
        pad_sequence(list(fields), batch_first=True)
        for fields in zip(
            *((getattr(item, other), item.action_log_probs, item.action_mask, item.sequences[1:]) for item in items),
            strict=True,
        )
    )
    return others, learner, mask, tokens[:, : mask.shape[1]]


def _noise_floor(trainer: Any) -> MismatchStats | None:
    """Measure the learner against itself: a few sequences are scored once more, each alone.

    As many forward passes on every rank, whatever its items: under ZeRO-3 each gathers parameters.
    """

    def choose() -> list[Any] | None:
        args, items = trainer.strategy.args, trainer.replay_buffer.items
        alone_already = get(args, "rollout.micro_batch_size") == 1 and not get(args, "train.dynamic_batch_enable")
        if alone_already or trainer.strategy.ring_attn_group is not None or getattr(trainer.actor, "is_vlm", False):
            return None
        sequences = get(args, "rollout.batch_size") * get(args, "rollout.n_samples_per_prompt")
        ranks = trainer.strategy.ds_device_mesh["dp"].size()
        count = max(1, round(current_plan().noise_floor_share * sequences / ranks))
        return [items[index * len(items) // count % len(items)] for index in range(count)]

    def score(chosen: list[Any]) -> MismatchStats:
        rescored = [SimpleNamespace(**vars(item), again=_score(trainer.actor, item)) for item in chosen]
        again, learner, mask, _ = _padded(rescored, "again")
        floor: MismatchStats = MismatchStats.from_log_probs(again, learner, mask)
        return floor

    return rank.noise_floor(choose, score)


@torch.no_grad()
def _score(actor: Any, item: Any) -> torch.Tensor:
    device = torch.cuda.current_device()
    training = actor.training
    actor.eval()
    try:
        fields = (item.sequences, item.action_mask, item.attention_mask)
        log_probs: torch.Tensor = actor(*(field[None].to(device) for field in fields))
        return log_probs[0].cpu()
    finally:
        actor.train(training)
