"""The replay buffer, asked more often: verl looks every two seconds, longer than a step of a tiny model takes."""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class AttentiveReplayBuffer(ReplayBuffer):
    """Given to verl as ``trainer.v1.sampler.custom_sampler``; what is sampled is the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "poll_interval": 0.1})
