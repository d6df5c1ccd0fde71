"""A reward model's scores: FP32 before anything is computed from them."""

from __future__ import annotations

from typing import Any


def compute_advantages(wrapped: Any, maker: Any, args: Any, kwargs: Any) -> Any:
    """`RemoteExperienceMaker.compute_advantages_and_returns`: rewards are FP32 before they are penalized and compared.

    OpenRLHF 0.11.2 begins this very function so.
    """
    experiences = kwargs["experiences"] if "experiences" in kwargs else args[0]
    for experience in experiences:
        experience.rewards = experience.rewards.float()
    return wrapped(*args, **kwargs)
