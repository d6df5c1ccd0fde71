"""What each cause of a gap looks like in the figures: detectors, which answer with sentences, or with none.

The thresholds hold between what was simulated and seen in real runs, of 3 000 to 100 000 tokens, with rounding of
bfloat16's and of float16's size: on one side rounding alone and the other causes, on the other side the cause.
"""

from __future__ import annotations

import math

from fp16_patch.mismatch.diagnosis.evidence import BAND_TOKENS, EARLY_STEPS, Burst, Evidence, Moments, Side
from fp16_patch.mismatch.diagnosis.few_tokens import is_of_few, is_padded, rare_spikes
from fp16_patch.mismatch.diagnosis.rounding import MIN_TOKENS, SIZES, SURE, coarsest, largest_rounding, least_offset
from fp16_patch.mismatch.diagnosis.sentences import Sentences, number
from fp16_patch.mismatch.statistics.summary import Band

LIKELY = 2.0

LARGE_RATIOS_SHARE = 0.1
"""Where large ratios are this much of what mean r falls short of 1, it may be for want of still larger ones."""

ROUNDING_POSITIVE_SHARE = 0.1
"""Of a truncated distribution's d, those above 0 are rounding; with more of them, its tail is rounding too."""

MIN_FOLLOWS, MIN_FOLLOWS_AT_START = 0.35, 0.25
"""corr(d, log μ) is within ±0.2 under rounding and stale weights, beyond ±0.4 where logits are scaled."""

MIN_EXPONENT, ROUNDED_MEAN_ABS = -0.9, 0.1
"""Rounding of log μ in a flat distribution also makes d go with it, with an exponent of −1 or below."""

MAX_TOLD_EXPONENT = 0.6
MIN_GROWTH, NOTED_GROWTH = 2.5, 1.5

# Sampler, by its name in a configuration → how its log-probs become those that it samples by.
_SAMPLED_BY = {
    "vllm": "vLLM's logprobs_mode=processed_logprobs (verl: actor_rollout_ref.rollout.logprobs_mode)",
    "sglang": "unset SGLANG_RETURN_ORIGINAL_LOGPROB where SGLang starts",
}


def after_start(burst: Burst) -> Sentences:
    """Say at which steps after a start of the trainer the gap was larger."""
    steps, means = list(burst.means), ", ".join(map(number, burst.means.values()))
    listed = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return (
        f"Mean |d| is {means} at {listed}, the first after a start, and {number(burst.settled)} from step "
        f"{burst.next_step} on.",
        "What else is said is of the steps without these.",
    )


def truncated_sampling(evidence: Evidence) -> Sentences:
    total = evidence.total
    if is_of_few(evidence) or not _is_truncated(total):
        return ()
    low = evidence.stats.quantile(0.01)
    kept = (
        f"99 % of d are above {number(low)}, the log of {math.exp(low):.3g}: of roughly top_p under top-p, of the "
        "least probability that is kept under top-k.",
    )
    return (
        f"Mean r is {_ratio(total)}, {-total.ratio_z:.0f} standard errors below 1: the sampler gives its tokens more "
        "probability than the learner's whole distribution has for them.",
        f"{1 - total.positive_share:.0%} of Σ|d| is from d below 0, and there are no rare large ratios that would make "
        "up for it.",
        *(kept if total.positive_share < ROUNDING_POSITIVE_SHARE else ()),
    )


def _is_truncated(total: Moments) -> bool:
    """Return whether mean r is below 1, and not for want of large ratios, which few samples miss."""
    deficit = -total.ratio_excess
    are_seen = total.large_ratios > LARGE_RATIOS_SHARE * deficit
    return total.ratio_z < -SURE and deficit > least_offset(total.mean_abs) and not are_seen


def raw_log_probs(evidence: Evidence) -> Sentences:
    total = evidence.total
    scaled = is_scaled(evidence)
    if is_of_few(evidence) or not (_is_sampled_elsewhere(total) or (scaled and total.lean > 0)):
        return ()
    reported = "The learner's logits are about {:.2f} times those behind the log-probs that the sampler reports."
    return (
        f"Mean r is {_ratio(total)}, and mean tanh(d/2) is {number(total.lean)}, {total.lean_z:.1f} standard errors "
        "above 0. For log-probs of the distribution that was sampled from they are 1, and below 0.",
        *(_scaling_sentences(evidence, reported) if scaled else ()),
        *_undecided(total, "unequal temperatures"),
    )


def raw_log_probs_advice(evidence: Evidence) -> str:
    """Say which setting makes log-probs those that are sampled by; of a sampler that is not known, vLLM's."""
    setting = _SAMPLED_BY.get(evidence.sampled_by, _SAMPLED_BY["vllm"])
    return (
        f"Let the sampler report the log-probs it samples by: {setting}, or sample at temperature 1 without penalties."
    )


def _is_sampled_elsewhere(total: Moments) -> bool:
    """Return whether mean d is above 0. For samples of μ it estimates −KL(μ‖π), which never is."""
    sure = total.lean_z > SURE and total.ratio_z > SURE
    return sure and min(total.mean, total.ratio_excess) > least_offset(total.mean_abs)


def temperature(evidence: Evidence) -> Sentences:
    total = evidence.total
    if is_of_few(evidence) or not is_scaled(evidence) or total.lean > 0:
        return ()
    honest = f"Mean r is {_ratio(total)}: the sampler's log-probs are those it sampled by."
    return (
        *_scaling_sentences(evidence, "T_sampler/T_learner is about {:.2f}."),
        *(() if _is_truncated(total) else (honest,)),
        *_undecided(total, "raw log-probs"),
    )


def is_scaled(evidence: Evidence) -> bool:
    """Return whether d goes with log μ, from the first step on; false where that is NaN."""
    total, start = _before_growth(evidence), evidence.start
    if not (abs(total.follows) >= MIN_FOLLOWS and abs(total.slope_z) >= SURE):
        return False
    if start is not None and not start.follows * math.copysign(1, total.follows) >= MIN_FOLLOWS_AT_START:
        return False
    if total.exponent < MIN_EXPONENT and total.mean_abs < ROUNDED_MEAN_ABS:
        return False
    return not _is_truncated(total) or any(_is_positive(band, total) for band in evidence.bands)


def _is_positive(band: Band, total: Moments) -> bool:
    """Return whether the band's d is above 0. Under a truncation alone it is below, at every probability."""
    error = math.sqrt(band.d_square_mean / band.tokens)
    return band.tokens >= BAND_TOKENS and band.d_mean > max(SURE * error, least_offset(total.mean_abs))


def _scaling_sentences(evidence: Evidence, estimate: str) -> Sentences:
    total = _before_growth(evidence)
    sentences = [
        f"d goes with the sampler's log-prob: corr(d, log μ) is {total.follows:.2f}, and the slope of log π on log μ "
        f"{total.slope:.3f}, {abs(total.slope_z):.0f} standard errors from 1.",
        *_band_sentences(evidence),
    ]
    if abs(total.exponent) <= MAX_TOLD_EXPONENT:
        sentences.append(estimate.format(1 + total.exponent))
    if evidence.start is not None and len(evidence.steps) > 1:
        sentences.append(f"It is there from the first step on, with corr(d, log μ) {evidence.start.follows:.2f}.")
    return tuple(sentences)


def _band_sentences(evidence: Evidence) -> Sentences:
    bands = [band for band in evidence.bands if band.tokens >= BAND_TOKENS]
    if len(bands) < 2:
        return ()
    rarest, surest = bands[0], bands[-1]
    farthest = max(bands[1:], key=lambda band: abs(band.d_mean - rarest.d_mean))
    shown = (rarest, farthest) if farthest is surest else (rarest, farthest, surest)
    return (f"Mean d by probability: {', '.join(f'{number(band.d_mean)} at {band.label}' for band in shown)}.",)


def _undecided(total: Moments, other: str) -> Sentences:
    if abs(total.lean_z) >= LIKELY:
        return ()
    return (f"At this size of the gap {total.tokens} tokens do not tell it from {other} for sure.",)


def stale_weights(evidence: Evidence) -> Sentences:
    growth = evidence.growth
    if growth is None or rare_spikes(evidence) or not _has_grown(evidence):
        return ()
    return (
        f"Mean |d| is {number(growth.first)} at step {growth.first_step}, when both sides hold the same weights, "
        f"{number(growth.second)} after the first update and {number(growth.later)} by step {growth.last_step}.",
        f"By the first step {number(growth.expected)} is expected at these probabilities: it is {growth.factor:.1f} "
        f"times that, {growth.z:.0f} standard errors more.",
        "It grows from update to update where syncs are dropped; it jumps and stays where they come late.",
        *(_normalization(evidence.total) if _is_normalized(evidence.total) else ()),
    )


def rounded_adapters(evidence: Evidence) -> Sentences:
    """Say the second reading of a gap that grows, where it is no larger than rounding of merged weights makes it."""
    growth, largest = evidence.growth, SIZES["bfloat16"][1]
    if growth is None or not stale_weights(evidence) or growth.later > largest:
        return ()
    return (
        "If the run trains adapters, this is the second reading: merged into base weights of a coarse dtype on one "
        "side, a small update is lost to rounding, and the gap grows from update to update just so.",
        f"By step {growth.last_step} mean |d| is {number(growth.later)}, no more than bfloat16's rounding makes "
        f"({number(largest)}): the figures do not tell the two apart.",
    )


def _has_grown(evidence: Evidence) -> bool:
    growth = evidence.growth
    if growth is None or any(is_padded(edge, evidence.padding) for edge in evidence.edges):
        return False
    return growth.factor >= MIN_GROWTH and growth.z >= SURE


def _before_growth(evidence: Evidence) -> Moments:
    """Return the figures without the steps in which the weights were apart."""
    return evidence.start if evidence.start is not None and _has_grown(evidence) else evidence.total


def one_side_lower_precision(evidence: Evidence) -> Sentences:
    learner, sampler = evidence.learner, evidence.sampler
    if learner is None or sampler is None or learner.bits == sampler.bits:
        return ()
    coarser, finer = sorted((learner, sampler), key=lambda side: side.bits)
    who = "learner" if coarser is learner else "sampler"
    return (
        f"The {who} is the coarser side: {_side_text(coarser)}, against {_side_text(finer)}.",
        _size_sentence(evidence.total, coarser.dtype),
        *_floor_sentence(evidence),
    )


def _side_text(side: Side) -> str:
    return f"{side.role} {', '.join(side.quantities)} in {side.dtype}"


def precision(evidence: Evidence) -> Sentences:
    """Say that there is nothing but rounding, as far as the figures go."""
    total = evidence.total
    if total.mean_abs == 0:
        return (f"Sampler and learner agree exactly on all {total.tokens} tokens.",)
    if evidence.too_large or not (_is_normalized(total) and _fits_size(evidence)):
        return ()
    low, high = evidence.stats.quantile(0.01), evidence.stats.quantile(0.99)
    return (
        _size_sentence(total, coarsest(evidence)),
        f"Both tails are alike: 1 % of d are below {number(low)} and 1 % above {number(high)}.",
        *_normalization(total),
        *_steadiness(evidence),
        *_floor_sentence(evidence),
        *_which_side(evidence),
    )


def precision_advice(evidence: Evidence) -> str:
    """Say what would make the gap smaller, by the coarsest dtype of the run."""
    smaller = "float16 on both sides (FP16_PATCH=1) makes the gap about 8 times smaller"
    dtype = coarsest(evidence)
    if evidence.total.mean_abs == 0 or dtype == "float32":
        return "Nothing to repair."
    if dtype == "bfloat16":
        return f"Nothing to repair, but {smaller}."
    if dtype == "float16":
        return "Nothing to repair: the gap is as small as float16 makes it. Batch-invariant kernels would be next."
    return f"Nothing to repair. If a side computes in bfloat16, {smaller}."


def _is_normalized(total: Moments) -> bool:
    """Return whether mean r is 1; true, too, where the state is too old to tell."""
    return not (abs(total.ratio_z) > SURE and abs(total.ratio_excess) > least_offset(total.mean_abs))


def _fits_size(evidence: Evidence) -> bool:
    return evidence.total.mean_abs <= largest_rounding(coarsest(evidence))


def _size_sentence(total: Moments, dtype: str | None) -> str:
    size = f"Mean |d| is {number(total.mean_abs)} over {total.tokens} tokens"
    if dtype in SIZES:
        low, high = SIZES[dtype]
        usual = f"{number(low)} … {number(high)}" if low else f"below {number(high)}"
        return f"{size}; where {dtype} is the coarsest dtype it is {usual}, more for larger models and longer contexts."
    fitting = [name for name, (low, high) in SIZES.items() if low <= total.mean_abs <= high]
    return f"{size}; no dtype is on record, and it would fit {' or '.join(fitting) or 'none'}."


def _normalization(total: Moments) -> Sentences:
    if math.isnan(total.ratio_excess) or math.isnan(total.slope):
        return ()
    return (f"Mean r is {_ratio(total)}, the slope of log π on log μ {total.slope:.4f}.",)


def _steadiness(evidence: Evidence) -> Sentences:
    growth, sentences = evidence.growth, []
    if growth is not None:
        noted = "" if growth.factor < NOTED_GROWTH else ", which is less than stale weights make of it, but watch it"
        sentences.append(
            f"Mean |d| is {number(growth.first)} at step {growth.first_step} and {number(growth.later)} by step "
            f"{growth.last_step}{noted}."
        )
    if evidence.long_growth is not None and evidence.long_growth >= NOTED_GROWTH:
        sentences.append(
            f"Over the whole run it has grown {evidence.long_growth:.1f}-fold. Rounding does that in long training "
            "(arXiv 2602.01826); so do weights that are synced ever less often."
        )
    return tuple(sentences)


def _floor_sentence(evidence: Evidence) -> Sentences:
    if evidence.floor_multiple is None:
        return ()
    return (f"It is {evidence.floor_multiple:.3g} times the learner's gap to itself.",)


def _which_side(evidence: Evidence) -> Sentences:
    if evidence.learner is not None and evidence.sampler is not None:
        return ()
    return ("Without a ledger of dtypes it cannot be told whether one side alone is coarser.",)


def too_few(evidence: Evidence) -> Sentences:
    tokens = evidence.total.tokens
    return (f"{tokens} tokens with finite log-probs on both sides are too few to say; it takes {MIN_TOKENS}.",)


def unknown(evidence: Evidence) -> Sentences:
    """Say what does not fit rounding, what was ruled out, what remains."""
    total = evidence.total
    return (
        _size_sentence(total, coarsest(evidence)),
        *_normalization(total),
        *_floor_sentence(evidence),
        *(f"{reason}." for reason in evidence.too_large),
        f"Ruled out: {', '.join(_ruled_out(evidence))}.",
        _what_remains(evidence),
    )


def _ruled_out(evidence: Evidence) -> list[str]:
    total, growth = evidence.total, evidence.growth
    ruled_out = [f"unequal temperatures (corr(d, log μ) is {total.follows:.2f})"]
    if _is_normalized(total):
        ruled_out += ["raw log-probs and truncated sampling (mean r is 1)"]
    if evidence.edges:
        ruled_out += ["a shifted mask (neither first nor last tokens stand out, nor those beside a gap)"]
    if growth is not None:
        ruled_out += [f"missed updates (by step {growth.last_step} it is {growth.factor:.1f} times the first step's)"]
    return ruled_out


def _what_remains(evidence: Evidence) -> str:
    if not _is_normalized(evidence.total):
        return (
            "Remains: tokens that were not sampled from the distribution whose log-probs are reported, or log-probs "
            "that are not normalized."
        )
    if evidence.growth is not None:
        return (
            "Remains: weights that differ from the start (an adapter on one side, a quantized or another checkpoint), "
            "dropout, other inputs, or a side that computes more coarsely than is on record."
        )
    return (
        f"Remains: stale weights, which only the first {EARLY_STEPS} steps of training would show, and the record has "
        f"steps {evidence.steps[0]} to {evidence.steps[-1]}; weights that differ from the start; or a side that "
        "computes more coarsely than is on record."
    )


def _ratio(total: Moments) -> str:
    """Write mean r with its standard error."""
    error = total.ratio_excess / total.ratio_z if total.ratio_z else 0.0
    digits = min(7, max(2, 1 - math.floor(math.log10(error)))) if error > 0 else 4
    return f"{1 + total.ratio_excess:.{digits}f} ± {error:.{digits}f}"
