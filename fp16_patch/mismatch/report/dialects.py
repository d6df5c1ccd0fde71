"""What each trainer calls the two sides' log-probs, the mask and the token ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fp16_patch.untrusted.text import quoted

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Dialect:
    """The names that one framework uses in its batch or export.

    Attributes:
        learner: in the order in which they are tried; a field that is null counts as missing.
        mask: likewise.
        token_ids: None for what the framework has no name for, or where its ids are not at the log-probs' places.
        missing: what the framework writes in the place of a sampler's log-prob that it does not have.
    """

    framework: str
    sampler: str
    learner: tuple[str, ...]
    mask: tuple[str, ...]
    token_ids: str | None = None
    missing: float | None = None


# Ours first: the order in which they are tried. Sources, beside the frameworks' documentation: AReaL's
# areal/trainer/ppo/actor.py, where input_ids are one place later than prox_logp; SkyRL's TrainingInput; ms-swift's
# GRPOBatch; open-instruct's grpo_utils.py, with its INVALID_LOGPROB.
DIALECTS = (
    Dialect("fp16_patch", "sampler_log_probs", ("learner_log_probs",), ("mask",), "token_ids"),
    Dialect("verl", "rollout_log_probs", ("old_log_probs",), ("response_mask",), "responses"),
    Dialect("OpenRLHF", "rollout_log_probs", ("action_log_probs",), ("action_mask",)),
    Dialect("slime", "rollout_log_probs", ("log_probs",), ("loss_masks",)),
    Dialect(
        "TRL",
        "sampling_per_token_logps",
        ("old_per_token_logps", "per_token_logps"),
        ("completion_mask",),
        "completion_ids",
    ),
    Dialect("ms-swift", "rollout_per_token_logps", ("old_per_token_logps", "per_token_logps"), ("completion_mask",)),
    Dialect("NeMo-RL", "generation_logprobs", ("prev_logprobs",), ("token_mask",), "input_ids"),
    Dialect("prime-rl", "inference_logprobs", ("trainer_logprobs",), ("loss_mask",), "token_ids"),
    Dialect("AReaL", "logprobs", ("prox_logp",), ("loss_mask",)),
    Dialect("SkyRL", "rollout_logprobs", ("action_log_probs",), ("loss_mask",), "response_ids"),
    Dialect(
        "open-instruct",
        "vllm_logprobs",
        ("old_logprobs", "local_logprobs"),
        ("response_mask", "response_masks"),
        "query_responses",
        missing=1.0,
    ),
)
MASKS = tuple(dict.fromkeys(mask for dialect in DIALECTS for mask in dialect.mask))


@dataclass(frozen=True)
class Spoken:
    """Where a line has what is compared; None for what it does not have."""

    sampler: str
    learner: str
    mask: str | None
    token_ids: str | None
    missing: float | None


def dialects(sampler_key: str | None, learner_key: str | None) -> list[Dialect]:
    """Return the known dialects, with the user's names in the place of theirs."""
    changes: dict[str, Any] = {}
    if sampler_key:
        changes |= {"sampler": sampler_key, "missing": None}
    if learner_key:
        changes |= {"learner": (learner_key,)}
    return [replace(dialect, **changes) for dialect in DIALECTS]


def spoken(content: Content, known: Sequence[Dialect]) -> Spoken | None:
    """Return the first pair of names under which the line has both sides; None if it has none."""
    for dialect in known:
        learner = _first_there(content, dialect.learner)
        if learner is not None and content.get(dialect.sampler) is not None:
            # A mask that is overlooked would count what was not sampled: it is looked for under every name.
            mask = _first_there(content, (*dialect.mask, *MASKS))
            ids = dialect.token_ids if dialect.token_ids and content.get(dialect.token_ids) is not None else None
            return Spoken(dialect.sampler, learner, mask, ids, dialect.missing)
    return None


def _first_there(content: Content, names: Sequence[str]) -> str | None:
    return next((name for name in names if content.get(name) is not None), None)


def problem_with(content: Content, known: Sequence[Dialect], given: Collection[str]) -> tuple[str, str]:
    """Say why no pair of names is in the line, and what to do.

    Args:
        given: the names that the user gave.
    """
    keys = quoted(", ".join(sorted(content))) or "none"
    absent = [key for key in given if key not in content]
    if absent:
        return (
            f"no key {quoted(', '.join(absent))}; there are: {keys}",
            "give --sampler-key and --learner-key names of these",
        )
    sides = {name for dialect in known for name in (dialect.sampler, *dialect.learner)}
    empty = sorted(name for name in sides & content.keys() if content[name] is None)
    if empty:
        return f"{', '.join(empty)} is null, and no other key holds that side; its keys: {keys}", _NAME_YOURS
    pairs = dict.fromkeys(
        f"  {dialect.sampler} with {' or '.join(dialect.learner)} ({dialect.framework})" for dialect in known
    )
    problem = f"the log-probs of sampler and learner are not in it; its keys: {keys}"
    return problem, "\n".join([f"{_NAME_YOURS}, or use one of these pairs:", *pairs])


_NAME_YOURS = "name yours with --sampler-key and --learner-key"
