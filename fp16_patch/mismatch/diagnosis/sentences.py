"""How a finding writes what it saw."""

from __future__ import annotations

Sentences = tuple[str, ...]


def number(value: float) -> str:
    """Write two significant digits."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float) -> str:
    """Write a share of the whole with two digits: 0.031 %."""
    return f"{100 * share:.2g} %"
