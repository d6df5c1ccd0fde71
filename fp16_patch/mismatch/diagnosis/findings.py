"""Finds what kind of gap a run has between sampler and learner, with the figures each finding rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fp16_patch.mismatch.diagnosis import causes
from fp16_patch.mismatch.diagnosis.causes import MIN_TOKENS, Sentences
from fp16_patch.mismatch.diagnosis.evidence import Evidence, Roles
from fp16_patch.mismatch.record.reading import RunRecord
from fp16_patch.mismatch.statistics.summary import MismatchStats


@dataclass(frozen=True)
class Diagnosis:
    """One cause, one of ``CAUSES``; evidence: sentences with the numbers; advice: what to change."""

    cause: str
    evidence: Sentences
    advice: str


@dataclass(frozen=True)
class _Cause:
    """Advice that depends on the run is made from its evidence."""

    detect: Callable[[Evidence], Sentences]
    advice: str | Callable[[Evidence], str]

    def advise(self, evidence: Evidence) -> str:
        return self.advice if isinstance(self.advice, str) else self.advice(evidence)


# In order of importance.
_BROKEN = {
    "nonfinite_sampler": _Cause(
        causes.nonfinite_sampler,
        "Look for overflow in the engine that samples: compare with its bfloat16 or an fp32 head, and with another "
        "attention kernel. Until then leave those tokens out of the loss.",
    ),
    "nonfinite_learner": _Cause(
        causes.nonfinite_learner,
        "Look for overflow in the learner's forward pass; if the model needs a wider range than FP16 has, run with "
        "FP16_PATCH=bf16.",
    ),
}
_FAULTS = {
    "mask_shifted": _Cause(
        causes.mask_shifted,
        "Check that the response mask, the sampler's log-probs and the learner's are of the same tokens: the padding, "
        "the end-of-sequence token, and the shift by one between logits and tokens.",
    ),
    "truncated_sampling": _Cause(
        causes.truncated_sampling,
        "Sample without truncation: top_p=1.0, top_k=-1, min_p=0 (verl: actor_rollout_ref.rollout.top_p and .top_k; "
        "OpenRLHF: --rollout.top_p). No log-prob of the learner matches a truncated distribution.",
    ),
    "raw_log_probs": _Cause(
        causes.raw_log_probs,
        "Let the sampler report the log-probs it samples by: vLLM's logprobs_mode=processed_logprobs (verl: "
        "actor_rollout_ref.rollout.logprobs_mode), or sample at temperature 1 without penalties.",
    ),
    "temperature": _Cause(
        causes.temperature,
        "Give both sides one temperature: what the sampler draws at (verl: actor_rollout_ref.rollout.temperature; "
        "OpenRLHF: --rollout.temperature), and what the learner divides its logits by; look for a request or a "
        "generation_config.json that overrides it.",
    ),
    "stale_weights": _Cause(
        causes.stale_weights,
        "Check that each update reaches the sampler before it draws again: that the sync runs, with all parameters and "
        "adapters, and that the engine drops its prefix cache. If it samples ahead by design, the importance ratio "
        "has to correct for it.",
    ),
    "one_side_lower_precision": _Cause(
        causes.one_side_lower_precision,
        "Compute in one dtype on both sides, weights in transit included: FP16_PATCH=1 sets float16 everywhere "
        "(verl: actor_rollout_ref.rollout.dtype is the sampler's; OpenRLHF: --ds.param_dtype is the learner's).",
    ),
}
_NO_FAULT = {
    "precision": _Cause(causes.precision, causes.precision_advice),
    "unknown": _Cause(
        causes.unknown,
        "Score some of the sampler's sequences with the sampler's own weights in float32, outside both engines: the "
        "side that disagrees is at fault. Record from the first step of training on.",
    ),
}
_TOO_FEW = _Cause(causes.too_few, "Record more steps, or more sequences a step.")

CAUSES = (*_BROKEN, *_FAULTS, *_NO_FAULT)


def diagnose(
    steps: Mapping[int, MismatchStats],
    ledger: Roles | None = None,
    plan: Mapping[str, Any] | None = None,
    noise_floor: MismatchStats | None = None,
) -> list[Diagnosis]:
    """Say what the gap comes from, most important first; never empty.

    Args:
        steps: step → the mismatch of its tokens. Step 0 or 1 is taken for the first of training, at which both sides
            hold the same weights.
        ledger: role → quantity → dtypes seen, as ``RunRecord.ledger``.
        plan: the content of ``plan.json``.
        noise_floor: the learner against itself.
    """
    evidence = Evidence.of(steps, ledger, plan, noise_floor)
    broken = _found(_BROKEN, evidence)
    if evidence.total.tokens < MIN_TOKENS:
        return [*broken, *_found({"unknown": _TOO_FEW}, evidence)]
    faults, (rest, *_) = _found(_FAULTS, evidence), _found(_NO_FAULT, evidence)
    if not faults or _explains_too_little(faults, rest):
        faults.append(rest)
    return broken + faults


def _explains_too_little(faults: list[Diagnosis], rest: Diagnosis) -> bool:
    """Return whether unequal dtypes are all that was found, and too little for a gap of this size."""
    return [fault.cause for fault in faults] == ["one_side_lower_precision"] and rest.cause == "unknown"


def diagnose_run(run: RunRecord) -> list[Diagnosis]:
    """Diagnose a recorded run."""
    return diagnose(run.step_stats, run.ledger or None, run.plan or None, run.noise_floor)


def _found(table: Mapping[str, _Cause], evidence: Evidence) -> list[Diagnosis]:
    found = ((name, cause, cause.detect(evidence)) for name, cause in table.items())
    return [Diagnosis(name, sentences, cause.advise(evidence)) for name, cause, sentences in found if sentences]
