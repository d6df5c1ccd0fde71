"""Adds up how much of a run's steps was measured."""

from __future__ import annotations

import math

from fp16_patch.mismatch.record.lines import Coverage

SHARE = "measured ÷ sampled tokens"
"""The name of the coverage's series; no metric of a line is called so."""

KEPT_COVERAGES = 2048
LISTED_PARTIAL_STEPS = 5


class CoveredSteps:
    """The coverage of a run.

    Attributes:
        steps, partial: how many steps say how much of them was measured, and how many not all.
        by_step: that of the first ``KEPT_COVERAGES`` of them.
    """

    def __init__(self) -> None:
        self.steps = self.partial = 0
        self.by_step: dict[int, Coverage] = {}
        self._tokens = self._expected = 0
        self._listed: list[str] = []

    def add(self, step: int, coverage: Coverage) -> None:
        self.steps += 1
        if len(self.by_step) < KEPT_COVERAGES:
            self.by_step[step] = coverage
        if coverage.expected_tokens:
            self._tokens += coverage.tokens
            self._expected += coverage.expected_tokens
        if not coverage.complete:
            self.partial += 1
            if len(self._listed) < LISTED_PARTIAL_STEPS:
                self._listed.append(f"step {step}: {coverage.text()}")

    def share(self) -> float:
        """Return the share of the sampled tokens that was measured; NaN where it was not recorded."""
        return self._tokens / self._expected if self._expected else math.nan

    def notes(self) -> list[str]:
        """List the first steps that were measured in part, and count the others."""
        more = self.partial - len(self._listed)
        return self._listed + ([f"{more} more steps are partly covered"] if more else [])
