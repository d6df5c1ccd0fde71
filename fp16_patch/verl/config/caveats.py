"""Tells what, besides precision, the mismatch of a run of verl holds, or why nothing of it is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fp16_patch.samplers.sampler import Sampler
from fp16_patch.verl.config.samplers import policy_sampler
from fp16_patch.verl.config.settings import bypasses_old_log_probs, samples_ahead
from fp16_patch.vllm.sampler import VLLM


def caveats_of(config: Any) -> list[str]:
    """Say what, besides precision, sampler and learner differ in, or why nothing is measured."""
    return [caveat for holds, caveat in _CAVEATS if holds(config)]


def _samples_from_a_part(config: Any) -> bool:
    rollout = config.actor_rollout_ref.rollout
    return bool(rollout.top_p < 1 or rollout.top_k > 0) and _sampler(config).renormalizes


def _sampler(config: Any) -> Sampler:
    # Of one that we do not know, the worst is said.
    return policy_sampler(config) or VLLM


def _leaves_out_the_temperature(config: Any) -> bool:
    setting = _sampler(config).log_prob_setting
    if setting is None:
        return False
    name, wanted = setting
    return bool(config.actor_rollout_ref.rollout.get(name) != wanted)


_CAVEATS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        bypasses_old_log_probs,
        "is measured in the first mini-batch of each update only: algorithm.rollout_correction.bypass_mode takes the "
        "sampler's log-probs for the learner's, and nothing else scores samples",
    ),
    (
        lambda config: not config.actor_rollout_ref.rollout.get("calculate_log_probs"),
        "is not measured: actor_rollout_ref.rollout.calculate_log_probs=False keeps none of the sampler's log-probs",
    ),
    (
        lambda config: samples_ahead(config) is not None,
        "includes the age of the sampler's weights, as training is asynchronous; mismatch/lag0_* is without it",
    ),
    (
        _leaves_out_the_temperature,
        "includes the temperature: actor_rollout_ref.rollout.logprobs_mode is not processed_logprobs",
    ),
    (_samples_from_a_part, "includes the renormalization by top_p or top_k, which the learner does not do"),
)
