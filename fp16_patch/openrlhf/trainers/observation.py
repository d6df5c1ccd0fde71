"""Observes the mismatch on the learner's ranks, in what they are about to train on: both log-probs are there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fp16_patch.mismatch.collection import actors, rank
from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.openrlhf.config.arguments import get
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
    first = index * len(items)
    rank.observe(actors.job_run(), index, size, number, lambda: (compare(items, "rollout_log_probs", first), {}), floor)


def has_sampler_log_probs(experience: Any) -> bool:
    """Return whether an experience, or an item of the replay buffer, has the sampler's log-probs."""
    return getattr(experience, "rollout_log_probs", None) is not None


def compare(items: list[Any], other: str, first_sequence: int = 0) -> MismatchStats:
    """Compare the learner's log-probs with another field's, over OpenRLHF's `Experience` items of one sequence each.

    Their actions start at the second token.
    """
    others, learner, mask, tokens = (
        pad_sequence(list(fields), batch_first=True)
        for fields in zip(
            *((getattr(item, other), item.action_log_probs, item.action_mask, item.sequences[1:]) for item in items),
            strict=True,
        )
    )
    stats: MismatchStats = MismatchStats.from_log_probs(
        others, learner, mask, token_ids=tokens[:, : mask.shape[1]], first_sequence=first_sequence
    )
    return stats


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
        return compare(rescored, "again")

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
