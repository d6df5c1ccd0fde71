"""Axes of charts: their ends, their ticks and what stands at a tick."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fp16_patch.mismatch.report.comparison import number_text

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A scale with ticks. ``base`` is 10 or 2 for a logarithmic axis, None for a linear one.

    ``texts`` are the names of categories, which lie at 0, 1, 2, …
    """

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    base: int | None = None
    texts: tuple[str, ...] = ()

    def share(self, value: float) -> float:
        """Position along the axis, 0 at ``low`` and 1 at ``high``; what lies outside is put on the end."""
        low, high, value = (self._linear(number) for number in (self.low, self.high, max(value, self.low)))
        return min(1.0, (value - low) / (high - low)) if high > low else 0.5

    def _linear(self, value: float) -> float:
        return math.log(value) if self.base else value

    def tick_text(self, tick: float) -> str:
        if self.texts:
            return self.texts[round(tick)]
        if self.base is None:
            return _tick_number(tick)
        exponent = math.floor(math.log(tick, self.base) + 1e-9)
        factor = round(tick / self.base**exponent)
        power = f"{self.base}{str(exponent).translate(SUPERSCRIPTS)}"
        return power if factor == 1 else f"{factor}·{power}"


def linear_axis(label: str, values: Iterable[float], snug: bool = False, whole: bool = False) -> Axis:
    """An axis from round number to round number; ``snug``: from the least to the greatest value."""
    least, greatest = min(values := list(values)), max(values)
    if least == greatest and not snug:
        least, greatest = least - (abs(least) or 1) / 10, greatest + (abs(greatest) or 1) / 10
    step = _round_step((greatest - least) / 5 or 1.0)
    step = max(1.0, round(step)) if whole else step
    if snug:
        inside = range(math.ceil(least / step - 1e-9), math.floor(greatest / step + 1e-9) + 1)
        return Axis(label, least, greatest, tuple(index * step for index in inside))
    around = range(math.floor(least / step + 1e-9), math.ceil(greatest / step - 1e-9) + 1)
    return Axis(label, around[0] * step, around[-1] * step, tuple(index * step for index in around))


def decade_axis(label: str, values: Iterable[float]) -> Axis:
    """A base-10 axis that ends at 1, 2 or 5 times a power of ten; ticks at powers alone where there are many."""
    positive = [value for value in values if value > 0]
    grid = [factor * 10.0**exponent for exponent in range(-24, 25) for factor in (1, 2, 5)]
    below = [index for index, tick in enumerate(grid) if tick <= min(positive) * 1.0000001]
    above = [index for index, tick in enumerate(grid) if tick >= max(positive) / 1.0000001]
    first, last = (below or [0])[-1], (above or [len(grid) - 1])[0]
    last = max(last, first + 1)
    ticks = grid[first : last + 1]
    if len(ticks) > 7:
        powers = grid[first - first % 3 : last + (-last) % 3 + 1 : 3]
        return Axis(label, powers[0], powers[-1], tuple(powers[:: math.ceil(len(powers) / 9)]), base=10)
    return Axis(label, ticks[0], ticks[-1], tuple(ticks), base=10)


def octave_axis(label: str, values: Iterable[float]) -> Axis:
    """A base-2 axis from a power to a power, with room for a mark above the greatest value."""
    exponents = [math.log2(value) for value in values if value > 0]
    first, last = math.floor(min(exponents)) - 1, math.ceil(max(exponents)) + 1
    stride = math.ceil((last - first) / 7)
    return Axis(
        label, 2.0**first, 2.0**last, tuple(2.0**exponent for exponent in range(first, last + 1, stride)), base=2
    )


def category_axis(label: str, texts: Sequence[str]) -> Axis:
    """An axis of named places, half a place wider at both ends."""
    return Axis(label, -0.5, len(texts) - 0.5, tuple(map(float, range(len(texts)))), texts=tuple(texts))


def _tick_number(value: float) -> str:
    """As many digits as the tick has, without rounding noise: 0.25, 2e-3, 1 500."""
    if value == 0 or 0.01 <= abs(value) < 1e4:
        return number_text(value) if float(value).is_integer() else f"{value:.6g}"
    mantissa, exponent = f"{value:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.9999999)
