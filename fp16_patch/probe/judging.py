"""What to train in, and why: fp16, fp16 with some modules in fp32, or bf16."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp16_patch.plan.probe_settings import BF16, FP16, FP16_WITH_FP32_MODULES
from fp16_patch.plan.settings import FIRST_SCALE
from fp16_patch.probe.families import Family
from fp16_patch.probe.headroom import GradientFit, Overflow
from fp16_patch.scaling.scaler import GRADIENT_MARGIN

NARROW = 2.0
"""Activations within this factor of 65504 fit today; training moves them, and other prompts reach further."""

MOST_FP32_MODULES = 8
LOST_GRADIENTS = 0.5
LISTED = 3


@dataclass(frozen=True)
class Recommendation:
    """What the probe advises.

    Attributes:
        precision: `fp16`, `fp16_with_fp32_modules` or `bf16`.
        fp32_modules: what would have to stay in FP32, on the learner's and on the sampler's side; empty otherwise.
        init_scale: the loss scale to start with, in FP16.
        reasons: what decided, most important first.
        warnings: what speaks against it all the same.
    """

    precision: str
    fp32_modules: tuple[str, ...]
    init_scale: float
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What is judged.

    Attributes:
        overflows: in the order of computation.
        residual: those of them that lie in the residual stream.
        least_headroom: 65504 ÷ the largest activation, forward and generation.
        fit: None where no backward was run.
        figures: learner/sampler → figures of `Pair`.
        refusals: dtype → why there is no sampler in it.
    """

    overflows: Sequence[Overflow]
    residual: Sequence[Overflow]
    least_headroom: float
    fit: GradientFit | None
    figures: Mapping[str, Mapping[str, Any]]
    refusals: Mapping[str, str]
    family: Family | None


def recommend(evidence: Evidence) -> Recommendation:
    scale = evidence.fit.init_scale if evidence.fit else FIRST_SCALE
    against = _against_fp16(evidence)
    if against:
        return Recommendation(BF16, (), scale, tuple(against), tuple(_warnings(evidence)))
    modules = tuple(dict.fromkeys(overflow.site.module for overflow in evidence.overflows))
    if modules:
        reasons = tuple(_first_overflows(evidence))
        return Recommendation(FP16_WITH_FP32_MODULES, modules, scale, reasons, tuple(_warnings(evidence)))
    return Recommendation(FP16, (), scale, tuple(_for_fp16(evidence)), tuple(_warnings(evidence)))


def _against_fp16(evidence: Evidence) -> list[str]:
    reasons = []
    modules = {overflow.site.module for overflow in evidence.overflows}
    if evidence.residual or len(modules) > MOST_FP32_MODULES:
        reasons += _first_overflows(evidence)
    if evidence.residual:
        reasons.append(f"no module can be kept in FP32 for it, the residual stream has it: {evidence.residual[0].site}")
    if "fp16" in evidence.refusals:
        reasons.append(f"no sampler in float16: {evidence.refusals['fp16']}")
    elif evidence.family and evidence.family.refused:
        reasons.append(f"vLLM does not serve it in float16. {evidence.family}")
    if evidence.fit and evidence.fit.lost_share > LOST_GRADIENTS:
        share = f"{evidence.fit.lost_share:.0%} of the parameters' gradients become 0"
        reasons.append(f"at the largest loss scale that fits, {evidence.fit.init_scale:g}, {share}")
    pair = evidence.figures.get("fp16/fp16", {})
    for side in ("sampler", "learner"):
        if pair.get(f"nonfinite_{side}"):
            reasons.append(f"the {side}'s log-probs of {pair[f'nonfinite_{side}']} tokens are not finite in fp16")
    return reasons


def _first_overflows(evidence: Evidence) -> list[str]:
    """Say of each module where it overflows first: what comes behind that may be its consequence."""
    by_module = {overflow.site.module: overflow for overflow in reversed(evidence.overflows)}
    return [str(overflow) for overflow in evidence.overflows if by_module[overflow.site.module] is overflow][:LISTED]


def _for_fp16(evidence: Evidence) -> list[str]:
    reasons = [f"the largest activation has room for a factor of {evidence.least_headroom:.3g}"]
    if evidence.fit and evidence.fit.tightest:
        fit = evidence.fit
        reasons.append(
            f"gradients bear a loss scale of {fit.largest_scale:.3g} ({fit.tightest}); {fit.init_scale:g} leaves room "
            f"for a factor of {min(fit.largest_scale / fit.init_scale, math.inf):.3g}"
        )
    fp16, bf16 = (evidence.figures.get(f"{dtype}/{dtype}", {}).get("mean_abs") for dtype in ("fp16", "bf16"))
    if fp16 and bf16:
        gain = f"mean |d| {fp16:.2e}, in bf16 {bf16:.2e}: a factor of {bf16 / fp16:.1f}"
        reasons.append(gain if bf16 > fp16 else f"no gain was measured: {gain}")
    return reasons


def _warnings(evidence: Evidence) -> list[str]:
    warnings = []
    if evidence.family and not evidence.family.refused:
        warnings.append(f"known risk: {evidence.family}")
    if 1 <= evidence.least_headroom < NARROW:
        warnings.append(
            f"activations come within a factor of {evidence.least_headroom:.2g} of 65504; training moves them: watch "
            "fp16/skipped_total and mismatch/nonfinite_*"
        )
    if evidence.fit and 1 <= evidence.fit.largest_scale < GRADIENT_MARGIN:
        warnings.append(f"gradients bear a loss scale of {evidence.fit.largest_scale:.2g} at most")
    return warnings
