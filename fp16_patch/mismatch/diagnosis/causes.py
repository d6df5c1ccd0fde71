"""What each cause of a gap looks like in the figures: detectors, which answer with sentences, or with none.

The thresholds hold between what was simulated and seen in real runs, of 3 000 to 100 000 tokens, with rounding of
bfloat16's and of float16's size: on one side rounding alone and the other causes, on the other side the cause.
"""

from __future__ import annotations

import math

from fp16_patch.mismatch.diagnosis.evidence import BAND_TOKENS, EARLY_STEPS, Edge, Evidence, Moments, Side
from fp16_patch.mismatch.statistics.summary import Band

Sentences = tuple[str, ...]

SIZES = {"float32": (0.0, 1e-4), "float16": (3e-5, 4e-3), "bfloat16": (3e-4, 3e-2)}
"""Mean |d| where both sides compute in the dtype, nats: of small models with peaked distributions and of large ones."""

MIN_TOKENS = 100

SURE = 5.0
"""Standard errors beyond which a figure is not chance: tokens of repeated contexts count as fewer than they are."""

LIKELY = 2.0

MIN_OFFSET, MIN_OFFSET_SHARE = 1e-4, 0.15
"""A mean of d or of r − 1 below these, the second a share of mean |d|, may be rounding of the normalization."""

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

EDGE_TOKENS, EDGE_FACTOR, EDGE_ONE_SIDED = 5, 10.0, 0.6
EDGE_MEAN_ABS, PADDED_EDGE_MEAN_ABS = 1.0, 0.05
"""A first token may be much less sure than the others, so it takes a large gap, unless the values are padding."""

SHIFTED_CORRELATION, SHIFTED_MEAN_ABS, SHIFTED_MEAN_SHARE = 0.6, 0.3, 0.3


def nonfinite_sampler(evidence: Evidence) -> Sentences:
    stats = evidence.stats
    return _nonfinite("sampler", stats.nonfinite_sampler, "learner", stats.nonfinite_learner, stats.tokens)


def nonfinite_learner(evidence: Evidence) -> Sentences:
    stats = evidence.stats
    return _nonfinite("learner", stats.nonfinite_learner, "sampler", stats.nonfinite_sampler, stats.tokens)


def _nonfinite(side: str, count: int, other: str, other_count: int, tokens: int) -> Sentences:
    if not count:
        return ()
    return (
        f"The {side}'s log-prob is NaN or infinite for {count} of {tokens} tokens ({count / tokens:.2%}), "
        f"the {other}'s for {other_count}.",
        "All other figures are of the tokens where both are finite.",
    )


def mask_shifted(evidence: Evidence) -> Sentences:
    padded = [edge for edge in evidence.edges if _is_padded(edge)]
    return tuple(sentence for edge in padded for sentence in _edge_sentences(edge)) or _shift_sentences(evidence.total)


def _is_padded(edge: Edge) -> bool:
    """Return whether the edge's d is far beyond the other tokens', and all to one side."""
    least = EDGE_MEAN_ABS if edge.padding is None else PADDED_EDGE_MEAN_ABS
    far = edge.band.tokens >= EDGE_TOKENS and edge.band.d_abs_mean >= least
    return far and edge.factor >= EDGE_FACTOR and edge.one_sided >= EDGE_ONE_SIDED


def _edge_sentences(edge: Edge) -> Sentences:
    label, band = edge.band.label, edge.band
    padding = (f"There the sampler's log-prob is {edge.padding:g} in most of the worst tokens, as padding is.",)
    return (
        f"Mean |d| of the {label} token of a sequence is {_n(band.d_abs_mean)}, {edge.factor:.0f} times that of the "
        f"tokens between first and last ({_n(edge.rest_abs_mean)}); its mean d is {_n(band.d_mean)}, all to one side.",
        *(padding if edge.padding is not None else ()),
    )


def _shift_sentences(total: Moments) -> Sentences:
    unrelated = total.correlation < SHIFTED_CORRELATION and total.mean_abs > SHIFTED_MEAN_ABS
    if not unrelated or abs(total.mean) > SHIFTED_MEAN_SHARE * total.mean_abs:
        return ()
    return (
        f"The two sides' log-probs are hardly related: their correlation is {total.correlation:.2f}, mean |d| is "
        f"{_n(total.mean_abs)}.",
        f"Yet on average they are alike: mean d is {_n(total.mean)}. So they are those of different tokens.",
    )


def truncated_sampling(evidence: Evidence) -> Sentences:
    total = evidence.total
    if mask_shifted(evidence) or not _is_truncated(total):
        return ()
    low = evidence.stats.quantile(0.01)
    kept = (
        f"99 % of d are above {_n(low)}, the log of {math.exp(low):.3g}: of roughly top_p under top-p, of the least "
        "probability that is kept under top-k.",
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
    return total.ratio_z < -SURE and deficit > _least_offset(total) and not are_seen


def _least_offset(total: Moments) -> float:
    return max(MIN_OFFSET, MIN_OFFSET_SHARE * total.mean_abs)


def raw_log_probs(evidence: Evidence) -> Sentences:
    total = evidence.total
    scaled = is_scaled(evidence)
    if mask_shifted(evidence) or not (_is_sampled_elsewhere(total) or (scaled and total.lean > 0)):
        return ()
    reported = "The learner's logits are about {:.2f} times those behind the log-probs that the sampler reports."
    return (
        f"Mean r is {_ratio(total)}, and mean tanh(d/2) is {_n(total.lean)}, {total.lean_z:.1f} standard errors above "
        "0. For log-probs of the distribution that was sampled from they are 1, and below 0.",
        *(_scaling_sentences(evidence, reported) if scaled else ()),
        *_undecided(total, "unequal temperatures"),
    )


def _is_sampled_elsewhere(total: Moments) -> bool:
    """Return whether mean d is above 0. For samples of μ it estimates −KL(μ‖π), which never is."""
    sure = total.lean_z > SURE and total.ratio_z > SURE
    return sure and min(total.mean, total.ratio_excess) > _least_offset(total)


def temperature(evidence: Evidence) -> Sentences:
    total = evidence.total
    if mask_shifted(evidence) or not is_scaled(evidence) or total.lean > 0:
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
    return band.tokens >= BAND_TOKENS and band.d_mean > max(SURE * error, _least_offset(total))


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
    return (f"Mean d by probability: {', '.join(f'{_n(band.d_mean)} at {band.label}' for band in shown)}.",)


def _undecided(total: Moments, other: str) -> Sentences:
    if abs(total.lean_z) >= LIKELY:
        return ()
    return (f"At this size of the gap {total.tokens} tokens do not tell it from {other} for sure.",)


def stale_weights(evidence: Evidence) -> Sentences:
    growth = evidence.growth
    if growth is None or not _has_grown(evidence):
        return ()
    return (
        f"Mean |d| is {_n(growth.first)} at step {growth.first_step}, when both sides hold the same weights, "
        f"{_n(growth.second)} after the first update and {_n(growth.later)} by step {growth.last_step}.",
        f"By the first step {_n(growth.expected)} is expected at these probabilities: it is {growth.factor:.1f} times "
        f"that, {growth.z:.0f} standard errors more.",
        "It grows from update to update where syncs are dropped; it jumps and stays where they come late.",
        *(_normalization(evidence.total) if _is_normalized(evidence.total) else ()),
    )


def _has_grown(evidence: Evidence) -> bool:
    growth = evidence.growth
    if growth is None or any(_is_padded(edge) for edge in evidence.edges):
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
    if not (_is_normalized(total) and _fits_size(evidence)):
        return ()
    low, high = evidence.stats.quantile(0.01), evidence.stats.quantile(0.99)
    return (
        _size_sentence(total, _coarsest(evidence)),
        f"Both tails are alike: 1 % of d are below {_n(low)} and 1 % above {_n(high)}.",
        *_normalization(total),
        *_steadiness(evidence),
        *_floor_sentence(evidence),
        *_which_side(evidence),
    )


def precision_advice(evidence: Evidence) -> str:
    """Say what would make the gap smaller, by the coarsest dtype of the run."""
    smaller = "float16 on both sides (FP16_PATCH=1) makes the gap about 8 times smaller"
    dtype = _coarsest(evidence)
    if evidence.total.mean_abs == 0 or dtype == "float32":
        return "Nothing to repair."
    if dtype == "bfloat16":
        return f"Nothing to repair, but {smaller}."
    if dtype == "float16":
        return "Nothing to repair: the gap is as small as float16 makes it. Batch-invariant kernels would be next."
    return f"Nothing to repair. If a side computes in bfloat16, {smaller}."


def _is_normalized(total: Moments) -> bool:
    """Return whether mean r is 1; true, too, where the state is too old to tell."""
    return not (abs(total.ratio_z) > SURE and abs(total.ratio_excess) > _least_offset(total))


def _fits_size(evidence: Evidence) -> bool:
    return evidence.total.mean_abs <= _largest(_coarsest(evidence))


def _coarsest(evidence: Evidence) -> str | None:
    """Return the coarser side's dtype, by the ledger, else by the plan."""
    sides = [side for side in (evidence.learner, evidence.sampler) if side is not None]
    return min(sides, key=lambda side: side.bits).dtype if sides else evidence.planned


def _largest(dtype: str | None) -> float:
    """Return the largest mean |d| of the dtype's rounding; bfloat16's for quantized dtypes and unknown ones."""
    return SIZES.get(dtype or "", SIZES["bfloat16"])[1]


def _size_sentence(total: Moments, dtype: str | None) -> str:
    size = f"Mean |d| is {_n(total.mean_abs)} over {total.tokens} tokens"
    if dtype in SIZES:
        low, high = SIZES[dtype]
        usual = f"{_n(low)} … {_n(high)}" if low else f"below {_n(high)}"
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
            f"Mean |d| is {_n(growth.first)} at step {growth.first_step} and {_n(growth.later)} by step "
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
        _size_sentence(total, _coarsest(evidence)),
        *_normalization(total),
        *_floor_sentence(evidence),
        f"Ruled out: {', '.join(_ruled_out(evidence))}.",
        _what_remains(evidence),
    )


def _ruled_out(evidence: Evidence) -> list[str]:
    total, growth = evidence.total, evidence.growth
    ruled_out = [f"unequal temperatures (corr(d, log μ) is {total.follows:.2f})"]
    if _is_normalized(total):
        ruled_out += ["raw log-probs and truncated sampling (mean r is 1)"]
    if evidence.edges:
        ruled_out += ["a shifted mask (neither first nor last tokens stand out)"]
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


def _n(value: float) -> str:
    """Write two significant digits."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
