"""The replay buffers, asked more often: verl looks every two seconds, longer than a step of a tiny model takes."""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

# Given to verl as ``trainer.v1.sampler.custom_sampler``; what is sampled is the same.
POLL_S = 0.1


class AttentiveReplayBuffer(ReplayBuffer):
    """For the trainer that waits for its samplers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "poll_interval": POLL_S})


class AttentiveReplayBufferAsync(ReplayBufferAsync):
    """For the trainers that do not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "poll_interval": POLL_S})
