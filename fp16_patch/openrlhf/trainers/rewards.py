"""Makes a reward model's scores FP32 before anything is computed from them."""

from __future__ import annotations

from typing import Any

from fp16_patch.patching.call_arguments import argument


def compute_advantages(wrapped: Any, maker: Any, args: Any, kwargs: Any) -> Any:
    """`RemoteExperienceMaker.compute_advantages_and_returns`: make rewards FP32 before they are penalized and compared.

    OpenRLHF 0.11.2 begins this very function so.
    """
    for experience in argument(wrapped, args, kwargs, "experiences"):
        if hasattr(experience, "rewards"):
            experience.rewards = experience.rewards.float()
        else:
            # Up to 0.8.2 they are among what is logged.
            experience.info["reward"] = experience.info["reward"].float()
    return wrapped(*args, **kwargs)
