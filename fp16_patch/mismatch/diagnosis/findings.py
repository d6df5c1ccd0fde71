"""Finds what kind of gap a run has between sampler and learner, with the figures each finding rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fp16_patch.mismatch.diagnosis import causes, few_tokens, recorded
from fp16_patch.mismatch.diagnosis.drift import LagCurve, drift
from fp16_patch.mismatch.diagnosis.evidence import Evidence, Roles, bursts_of
from fp16_patch.mismatch.diagnosis.rounding import MIN_TOKENS
from fp16_patch.mismatch.diagnosis.sentences import Sentences
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
_NO_FIGURES = {
    "not_log_probs": _Cause(
        recorded.not_log_probs,
        "Look at how that side computes what it calls log-probs: they have to be normalized over the vocabulary "
        "(log_softmax), with their minus sign, and logarithms.",
    ),
}
_BROKEN = {
    "nonfinite_sampler": _Cause(
        recorded.nonfinite_sampler,
        "Look for overflow in the engine that samples: compare with its bfloat16 or an fp32 head, and with another "
        "attention kernel. Until then leave those tokens out of the loss.",
    ),
    "nonfinite_learner": _Cause(
        recorded.nonfinite_learner,
        "Look for overflow in the learner's forward pass; if the model needs a wider range than FP16 has, run with "
        "FP16_PATCH=bf16.",
    ),
    "certain_tokens": _Cause(
        recorded.certain_tokens,
        "Nothing to repair: read them as 0, or leave those tokens out of the loss.",
    ),
}
_AFTER_START = (
    "Nothing to repair in what came later. Look at what the sampler held at the start: that the loaded weights, "
    "adapters included, reach it before the first draw, and that no samples of an earlier policy are still in a queue. "
    "Leave those steps out of comparisons."
)
_FAULTS = {
    "coarse_record": _Cause(
        recorded.coarse_record,
        "Compute log-probs in float32 (log_softmax of float32 logits), and keep them so until they are compared: the "
        "record is coarse, which says nothing of the engine.",
    ),
    "mask_shifted": _Cause(
        few_tokens.mask_shifted,
        "Check that the response mask, the sampler's log-probs and the learner's are of the same tokens: the padding, "
        "the end-of-sequence token, and the shift by one between logits and tokens.",
    ),
    "one_position": _Cause(
        few_tokens.one_position,
        "Look at what differs there. First token: the prompt's last position, chunked prefill, a prefix cache, the "
        "chat template. After or before a gap: how a tool's answer or a turn is tokenized again, and where its mask "
        "begins. Last token: end-of-sequence and stop tokens.",
    ),
    "rare_spikes": _Cause(
        few_tokens.rare_spikes,
        "Find what those tokens share: a token id, a position, a request that was preempted or came from a cache, a "
        "router's near tie. Until then bound their weights (verl: algorithm.rollout_correction.rollout_is=token).",
    ),
    "truncated_sampling": _Cause(
        causes.truncated_sampling,
        "Sample without truncation: top_p=1.0, top_k=-1, min_p=0 (verl: actor_rollout_ref.rollout.top_p and .top_k; "
        "OpenRLHF: --rollout.top_p). No log-prob of the learner matches a truncated distribution.",
    ),
    "raw_log_probs": _Cause(
        causes.raw_log_probs,
        causes.raw_log_probs_advice,
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
    "rounded_adapters": _Cause(
        causes.rounded_adapters,
        "Merge adapters into float32 weights and round once, or send them unmerged (verl: "
        "actor_rollout_ref.model.lora.merge); if the gap stays, it is stale weights.",
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

AFTER_START = "after_start"
DRIFT = "drift"
_DRIFT = (
    "Nothing to repair: this is the price of sampling ahead. Where it hurts, let samples be fresher (verl: "
    "trainer.v1.sampler.max_off_policy_threshold, async_training.staleness_threshold; OpenRLHF: "
    "--train.async_queue_size), or correct by importance ratios (verl: algorithm.rollout_correction)."
)
CAUSES = (*_NO_FIGURES, *_BROKEN, DRIFT, AFTER_START, *_FAULTS, *_NO_FAULT)


def diagnose(
    steps: Mapping[int, MismatchStats],
    ledger: Roles | None = None,
    plan: Mapping[str, Any] | None = None,
    noise_floor: MismatchStats | None = None,
    starts: Iterable[int] = (),
) -> list[Diagnosis]:
    """Say what the gap comes from, most important first; never empty.

    Args:
        steps: step → the mismatch of its tokens. Step 0 or 1 is taken for the first of training, at which both sides
            hold the same weights.
        ledger: role → quantity → dtypes seen, as ``RunRecord.ledger``.
        plan: the content of ``plan.json``; its thresholds of alerts are those of the diagnosis.
        noise_floor: the learner against itself.
        starts: the first step that each start of the trainer wrote.
    """
    evidence = Evidence.of(steps, ledger, plan, noise_floor)
    if no_figures := _found(_NO_FIGURES, evidence):
        return no_figures
    broken = _found(_BROKEN, evidence)
    if evidence.total.tokens < MIN_TOKENS:
        return [*broken, *_found({"unknown": _TOO_FEW}, evidence)]
    if bursts := bursts_of(steps, starts):
        apart = {step for burst in bursts for step in burst.means}
        rest = {step: stats for step, stats in steps.items() if step not in apart}
        evidence = Evidence.of(rest, ledger, plan, noise_floor)
    early = [Diagnosis(AFTER_START, causes.after_start(burst), _AFTER_START) for burst in bursts]
    faults, (last, *_) = _found(_FAULTS, evidence), _found(_NO_FAULT, evidence)
    if not faults or _explains_too_little(faults, last, evidence):
        faults.append(last)
    return broken + early + faults


def _explains_too_little(faults: list[Diagnosis], last: Diagnosis, evidence: Evidence) -> bool:
    """Return whether unequal dtypes, or a coarse record, are all that was found, and too little for such a gap."""
    found = [fault.cause for fault in faults]
    if found == ["coarse_record"]:
        return not recorded.record_explains(evidence)
    return found == ["one_side_lower_precision"] and last.cause == "unknown"


def diagnose_run(run: RunRecord) -> list[Diagnosis]:
    """Diagnose a recorded run; where it knows how old its samples are, by those that are fresh."""
    known = run.ledger or None, run.plan or None, run.noise_floor
    curve = LagCurve.of(run.by_lag, run.stats.tokens)
    if curve.is_fresh():
        return diagnose(run.step_stats, *known, run.starts)
    whole = Evidence.of(run.step_stats, *known)
    if no_figures := _found(_NO_FIGURES, whole):
        return no_figures
    found = [*_found(_BROKEN, whole), Diagnosis(DRIFT, drift(curve), _DRIFT)]
    numerics = run.numerics()
    if sum(stats.finite_tokens for stats in numerics.values()) < MIN_TOKENS:
        return found
    return found + [each for each in diagnose(numerics, *known, run.starts) if each.cause not in _BROKEN]


def _found(table: Mapping[str, _Cause], evidence: Evidence) -> list[Diagnosis]:
    found = ((name, cause, cause.detect(evidence)) for name, cause in table.items())
    return [Diagnosis(name, sentences, cause.advise(evidence)) for name, cause, sentences in found if sentences]
