"""Detectors of gaps that few tokens have: those at one place of the sequences, or single ones anywhere."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fp16_patch.mismatch.diagnosis.evidence import BAND_TOKENS, Evidence, Moments
from fp16_patch.mismatch.diagnosis.judgement import too_large
from fp16_patch.mismatch.diagnosis.rounding import SURE, coarsest, largest_rounding, least_offset
from fp16_patch.mismatch.diagnosis.sentences import Sentences, number, percent
from fp16_patch.mismatch.statistics.summary import Edge, WorstToken

EDGE_TOKENS, EDGE_FACTOR, EDGE_ONE_SIDED = 5, 10.0, 0.6
EDGE_MEAN_ABS, PADDED_EDGE_MEAN_ABS = 1.0, 0.05
"""A first token may be much less sure than the others, so it takes a large gap, unless the values are padding."""

EDGE_GAP_SHARE, EDGE_STANDS_OUT = 0.5, 5.0
"""The gap lies on edges that have so large a share of Σ|d|, each so many times what tokens as likely have elsewhere."""

SHIFTED_CORRELATION, SHIFTED_MEAN_ABS, SHIFTED_MEAN_SHARE = 0.6, 0.3, 0.3
SHOWN_TOKENS = 3


def mask_shifted(evidence: Evidence) -> Sentences:
    padded = [edge for edge in evidence.edges if is_padded(edge, evidence.padding)]
    sentences = tuple(sentence for edge in padded for sentence in _edge_sentences(edge, evidence.padding))
    return sentences or _shift_sentences(evidence.total)


def is_padded(edge: Edge, padding: float | None) -> bool:
    """Return whether the edge's d is far beyond the other tokens', and all to one side."""
    band = edge.band
    least = EDGE_MEAN_ABS if padding is None else PADDED_EDGE_MEAN_ABS
    far = band.tokens >= EDGE_TOKENS and band.d_abs_mean >= least
    one_sided = abs(band.d_mean) >= EDGE_ONE_SIDED * band.d_abs_mean
    return far and _times(edge.band.d_abs_mean, edge.rest_abs_mean) >= EDGE_FACTOR and one_sided


def _times(value: float, other: float) -> float:
    return value / other if other else math.nan


def _edge_sentences(edge: Edge, padding: float | None) -> Sentences:
    label, band = edge.band.label, edge.band
    sentences = [
        f"Mean |d| of the {_place(label)} is {number(band.d_abs_mean)}, "
        f"{_times(band.d_abs_mean, edge.rest_abs_mean):.0f} times that of the tokens at no edge "
        f"({number(edge.rest_abs_mean)}); its mean d is {number(band.d_mean)}, all to one side.",
    ]
    if padding is not None:
        sentences.append(f"There the sampler's log-prob is {padding:g} in most of the worst tokens, as padding is.")
    return tuple(sentences)


def _place(label: str) -> str:
    """Name an edge's token: `first token of a sequence`, `token after a gap in the mask`."""
    return f"{label} token of a sequence" if label in ("first", "last") else f"token {label} in the mask"


def one_position(evidence: Evidence) -> Sentences:
    """Say that most of the gap lies on one place of the sequences, where tokens as likely have far less elsewhere."""
    edges = [edge for edge in evidence.edges if _stands_out(edge)]
    gap = evidence.stats.d_abs_sum
    if mask_shifted(evidence) or not sum(_edge_gap(edge) for edge in edges) >= EDGE_GAP_SHARE * gap > 0:
        return ()
    return tuple(
        f"{_edge_gap(edge) / gap:.0%} of Σ|d| lies on the {_place(edge.band.label)}, {edge.band.tokens} of "
        f"{evidence.total.tokens} tokens: mean |d| is {number(edge.band.d_abs_mean)} there, "
        f"{number(edge.expected_abs_mean)} at the same probabilities elsewhere, "
        f"and {number(edge.rest_abs_mean)} of all tokens at no edge."
        for edge in edges
    )


def _stands_out(edge: Edge) -> bool:
    """Return whether the edge has far more of a gap than its tokens' probabilities explain; false where that is NaN."""
    band = edge.band
    error = math.sqrt(max(0.0, band.d_square_mean - band.d_abs_mean**2) / band.tokens)
    surely = band.d_abs_mean - edge.expected_abs_mean > SURE * error
    return band.tokens >= BAND_TOKENS and band.d_abs_mean >= EDGE_STANDS_OUT * edge.expected_abs_mean and surely


def _edge_gap(edge: Edge) -> float:
    return edge.band.d_abs_mean * edge.band.tokens


def is_misplaced(evidence: Evidence) -> bool:
    """Return whether the gap is one of places, by which the figures over all tokens mislead."""
    return bool(mask_shifted(evidence) or one_position(evidence))


def _shift_sentences(total: Moments) -> Sentences:
    unrelated = total.correlation < SHIFTED_CORRELATION and total.mean_abs > SHIFTED_MEAN_ABS
    if not unrelated or abs(total.mean) > SHIFTED_MEAN_SHARE * total.mean_abs:
        return ()
    return (
        f"The two sides' log-probs are hardly related: their correlation is {total.correlation:.2f}, mean |d| is "
        f"{number(total.mean_abs)}.",
        f"Yet on average they are alike: mean d is {number(total.mean)}. So they are those of different tokens.",
    )


def rare_spikes(evidence: Evidence) -> Sentences:
    """Say which few tokens make a figure too large that is fine without them."""
    spikes = evidence.spikes
    if spikes is None or not evidence.too_large or is_misplaced(evidence) or not _is_rounding_without(evidence):
        return ()
    n = evidence.total.tokens
    without = spikes.rest["mismatch/token_mult_prob_error"]
    excess = 1 - (without - 1) * (n - spikes.tokens) / evidence.stats.expm1_abs_sum
    return (
        f"{spikes.tokens} of {n} tokens ({percent(spikes.tokens / n)}) are off by more than {number(spikes.limit)} "
        f"nats, up to {number(evidence.stats.d_abs_max)}. They carry {spikes.gap_share:.0%} of Σ|d|, and {excess:.0%} "
        "of mean exp|d| − 1.",
        *(f"{reason}." for reason in evidence.too_large),
        f"Without these tokens mean exp|d| is {without:.4f}, and mean |d| {number(spikes.rest_mean_abs)}, as rounding "
        "makes it.",
        *_worst_sentences(spikes.worst),
    )


def _is_rounding_without(evidence: Evidence) -> bool:
    spikes = evidence.spikes
    if spikes is None or too_large(spikes.rest, evidence.thresholds):
        return False
    is_normalized = abs(spikes.rest["mismatch/is_mean"] - 1) <= least_offset(spikes.rest_mean_abs)
    return is_normalized and spikes.rest_mean_abs <= largest_rounding(coarsest(evidence))


def _worst_sentences(worst: Sequence[tuple[int, WorstToken]]) -> Sentences:
    shown = "; ".join(_token_text(step, token) for step, token in worst[:SHOWN_TOKENS])
    ids = Counter(token.token_id for _, token in worst if token.token_id >= 0)
    most, count = ids.most_common(1)[0] if ids else (0, 0)
    same = count >= 3 and 2 * count >= len(worst)
    return (
        *([f"The worst: {shown}."] if shown else []),
        *([f"{count} of the worst {len(worst)} are of token id {most}."] if same else []),
    )


def _token_text(step: int, token: WorstToken) -> str:
    name = f", token id {token.token_id}" if token.token_id >= 0 else ""
    p_sampler, p_learner = (math.exp(min(0.0, log_prob)) for log_prob in (token.sampler, token.learner))
    return (
        f"d {token.d:+.2f} at step {step}, sequence {token.sequence}, position {token.position}{name} "
        f"(p {number(p_sampler)} against the learner's {number(p_learner)})"
    )


def is_of_few(evidence: Evidence) -> bool:
    return bool(is_misplaced(evidence) or rare_spikes(evidence))
