"""What a gap may be by rounding alone."""

from __future__ import annotations

from fp16_patch.mismatch.diagnosis.evidence import Evidence

SIZES = {"float32": (0.0, 1e-4), "float16": (3e-5, 4e-3), "bfloat16": (3e-4, 3e-2)}
"""Mean |d| where both sides compute in the dtype, nats: of small models with peaked distributions and of large ones."""

MIN_OFFSET, MIN_OFFSET_SHARE = 1e-4, 0.15
"""A mean of d or of r − 1 below these, the second a share of mean |d|, may be rounding of the normalization."""

SURE = 5.0
"""Standard errors beyond which a figure is not chance: tokens of repeated contexts count as fewer than they are."""

MIN_TOKENS = 100


def least_offset(mean_abs: float) -> float:
    """Return the least mean of d, or of r − 1, that rounding of this size does not explain."""
    return max(MIN_OFFSET, MIN_OFFSET_SHARE * mean_abs)


def coarsest(evidence: Evidence) -> str | None:
    """Return the coarser side's dtype, by the ledger, else by the plan."""
    sides = [side for side in (evidence.learner, evidence.sampler) if side is not None]
    return min(sides, key=lambda side: side.bits).dtype if sides else evidence.planned


def largest_rounding(dtype: str | None) -> float:
    """Return the largest mean |d| of the dtype's rounding; bfloat16's for quantized dtypes and unknown ones."""
    return SIZES.get(dtype or "", SIZES["bfloat16"])[1]
