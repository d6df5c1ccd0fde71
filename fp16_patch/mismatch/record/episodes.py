"""Follows alerts over the steps of a run: since when each stood, and until when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fp16_patch.mismatch.record.lines import StandingAlert

MOST_EPISODES = 500


@dataclass(frozen=True)
class Episode:
    """An alert from the step it is about to the last one at which it stood, with the value there."""

    alert: StandingAlert
    until: int
    standing: bool


class Episodes:
    """The alerts of a run, line by line; ``left_out``: alerts of lines beyond the first ``MOST_EPISODES`` episodes."""

    def __init__(self) -> None:
        self.left_out = 0
        self._last: dict[tuple[str, int], tuple[StandingAlert, int]] = {}

    def add(self, step: int, alerts: Iterable[StandingAlert]) -> None:
        for alert in alerts:
            key = (alert.name, alert.since)
            if key in self._last or len(self._last) < MOST_EPISODES:
                self._last[key] = (alert, step)
            else:
                self.left_out += 1

    def until(self, end: int) -> list[Episode]:
        """Return the episodes in the order in which they began; ``end`` is the last step."""
        episodes = [Episode(alert, step, standing=step == end) for alert, step in self._last.values()]
        return sorted(episodes, key=lambda episode: (episode.alert.since, episode.alert.name))
