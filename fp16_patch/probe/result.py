"""What a probe found, as it is written and read again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fp16_patch.plan.probe_settings import VERSION
from fp16_patch.probe.comparing import Pair
from fp16_patch.probe.judging import Recommendation


@dataclass(frozen=True)
class ProbeResult:
    """See `fp16_patch.probe.examine`.

    Attributes:
        model: where it is, its family, size, and the digest of its configuration.
        settings: what was asked, and with which releases.
        mismatch: `learner/sampler` → figures, see `Pair.figures`.
        noise_floor: learner's dtype → the figures of the learner against itself in another batch size.
        gain: mean |d| of bf16/bf16 ÷ fp16/fp16 and its 95 % interval; None where one was not measured.
        headroom: a row a module and phase, see `headroom.table`.
        gradients: see `headroom.GradientFit`; None where no backward was run.
        overflows: in the order of computation: where, how large, and the same in words.
        refusals: dtype → why there is no sampler in it.
        cost: seconds, and the process's largest memory in bytes.
        pairs: what was compared, for plots; not written.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    mismatch: dict[str, dict[str, Any]]
    noise_floor: dict[str, dict[str, Any]]
    gain: dict[str, Any] | None
    headroom: list[dict[str, Any]]
    gradients: dict[str, Any] | None
    overflows: list[dict[str, Any]]
    refusals: dict[str, str]
    recommendation: Recommendation
    cost: dict[str, float]
    pairs: dict[str, Pair] = field(default_factory=dict, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON has it; what is not finite is None."""
        shown = {name: value for name, value in vars(self).items() if name not in ("pairs", "recommendation")}
        numbers: dict[str, Any] = finite({"version": VERSION, **shown, "recommendation": asdict(self.recommendation)})
        return numbers

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """Return the same, nested as it is, with None for numbers that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
