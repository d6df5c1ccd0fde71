"""Tells what, besides precision, the mismatch of a run of OpenRLHF holds, or why nothing of it is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fp16_patch.openrlhf.config.arguments import get, is_supervised
from fp16_patch.patching.sources import Installed

# Where the class of a sample lies: in the second from 0.9 on.
_EXPERIENCE = ("openrlhf.trainer.ppo_utils.experience_maker", "openrlhf.trainer.ppo_utils.experience")


def caveats_of(args: Any) -> list[str]:
    """Say what, besides precision, sampler and learner differ in, or why nothing is measured."""
    return [] if is_supervised(args) else [caveat for holds, caveat in _CAVEATS if holds(args)]


def samples_hold_log_probs() -> bool:
    """Return whether the samples of the installed release have the sampler's log-probs."""
    return any("rollout_log_probs" in (Installed().read(module) or "") for module in _EXPERIENCE)


def buffers_keep_prompts() -> bool:
    """Return whether replay buffers of the installed release keep a sample's prompt, which knows its age."""
    return "prompts" in (Installed().read(_EXPERIENCE[1]) or "")


_CAVEATS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda args: get(args, "train.async_enable") and buffers_keep_prompts(),
        "includes the age of the sampler's weights, as training is asynchronous; mismatch/lag0_* is without it",
    ),
    (
        lambda args: get(args, "train.async_enable") and not buffers_keep_prompts(),
        "includes the age of the sampler's weights, as training is asynchronous; up to 0.9.8, nobody knows that age",
    ),
    (
        lambda args: (get(args, "rollout.top_p") or 1) < 1,
        "includes the renormalization by top_p, which the learner does not do",
    ),
    (
        lambda args: not samples_hold_log_probs(),
        "is not measured: up to 0.8.8, OpenRLHF's samples do not hold the sampler's log-probs",
    ),
)
