"""What the seen ranges mean for FP16: where it overflows, and which loss scale the gradients bear."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fp16_patch.probe.extremes import FP16_MAX, FP16_SMALLEST, FP16_SMALLEST_NORMAL, Range
from fp16_patch.probe.watching import BACKWARD, Site
from fp16_patch.scaling.scaler import fitting_scale

Ranges = Mapping[Site, Range]


@dataclass(frozen=True)
class Overflow:
    """Numbers that FP16 does not hold.

    Attributes:
        site: the first place of its kind, in the order of computation; what lies behind it may be its consequence.
        max_abs: the largest one; NaN or infinite where not even FP32 held it.
    """

    site: Site
    max_abs: float

    def __str__(self) -> str:
        what = "gradient of " if self.site.phase == BACKWARD else ""
        size = f"{self.max_abs:,.0f}" if math.isfinite(self.max_abs) else f"{self.max_abs}, in FP32 already"
        return f"{self.site.phase}: {what}{self.site} reaches {size}; FP16 ends at {FP16_MAX:,.0f}"

    def as_dict(self) -> dict[str, Any]:
        return {**self.site._asdict(), "max_abs": self.max_abs, "text": str(self)}


@dataclass(frozen=True)
class GradientFit:
    """How the gradients lie in FP16's range.

    Attributes:
        largest_scale: 65504 ÷ the largest |gradient|: with more, it overflows. Infinite where all are 0.
        tightest: where that gradient is; None where all are 0.
        init_scale: a power of two, with the room that `fitting_scale` leaves.
        subnormal_share: at that scale, the share of the parameters' non-zero gradients below FP16's smallest normal
            number, where it has fewer than its 11 bits.
        lost_share: the share of them that becomes 0.
    """

    largest_scale: float
    tightest: Site | None
    init_scale: float
    subnormal_share: float
    lost_share: float


def overflows(ranges: Ranges) -> list[Overflow]:
    """Return every site whose largest number does not fit, in the order of computation; gradients at scale 1."""
    return [Overflow(site, seen.max_abs) for site, seen in ranges.items() if seen.headroom() < 1]


def gradient_fit(ranges: Ranges) -> GradientFit:
    """Return how the gradients lie in FP16's range."""
    gradients = {site: seen for site, seen in ranges.items() if site.phase == BACKWARD}
    tightest = min(gradients, key=lambda site: gradients[site].headroom(), default=None)
    largest = gradients[tightest].headroom() if tightest else math.inf
    scale = fitting_scale(largest)
    of_parameters = _together(seen for site, seen in gradients.items() if site.tensor.startswith("parameter"))
    return GradientFit(
        largest_scale=largest,
        tightest=tightest if math.isfinite(largest) else None,
        init_scale=scale,
        subnormal_share=of_parameters.share_below(FP16_SMALLEST_NORMAL, scale),
        lost_share=of_parameters.share_below(FP16_SMALLEST / 2, scale),
    )


def _together(ranges: Iterable[Range]) -> Range:
    total = Range(0.0, {}, 0)
    for seen in ranges:
        total = total.merge(seen)
    return total


def in_residual_stream(site: Site, model: nn.Module) -> bool:
    """Return whether what was seen there goes round every layer: no single module kept in FP32 would hold it."""
    module = dict(model.named_modules()).get(site.module)
    is_block = site.module in _blocks(model) and site.tensor == "output"
    return is_block or (module is not None and "norm" in type(module).__name__.lower() and site.tensor == "input")


def _blocks(model: nn.Module) -> set[str]:
    """Return the layers of the stack: direct children of the lists that are not inside a layer."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    modules = dict(model.named_modules())
    return {f"{name}.{child}" for name in outer for child, _ in modules[name].named_children()}


def table(ranges: Ranges, scale: float) -> list[dict[str, Any]]:
    """Return a row a module and phase, the least headroom first; gradients are multiplied by ``scale``."""
    rows = [_row(site, seen, scale if site.phase == BACKWARD else 1.0) for site, seen in ranges.items()]
    tightest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["headroom"]):
        tightest.setdefault((row["module"], row["phase"]), row)
    return list(tightest.values())


def _row(site: Site, seen: Range, scale: float) -> dict[str, Any]:
    return {
        **site._asdict(),
        "max_abs": seen.max_abs,
        "headroom": seen.headroom(scale),
        "subnormal_share": seen.share_below(FP16_SMALLEST_NORMAL, scale),
    }
