"""Counts the versions of the policy's weights, as they are made, sent to samplers and scored with."""

from __future__ import annotations

from typing import Any

KEPT_LABELS = 256
"""Samples of older syncs than this many have an unknown lag."""


class WeightVersions:
    """Knows for each label, by which a framework tells its syncs apart, which version of the weights it stands for.

    Frameworks label a sync with a step, and not every sync sends other weights: two labels are one version if no update
    lies between them. So a lag is counted in versions that differ, and is 0 only where the weights are the same.
    """

    def __init__(self) -> None:
        self._version = 0
        self._is_updated = False
        self._of_label: dict[Any, int] = {}

    def updated(self) -> None:
        """Note that the learner's weights are other ones from now on."""
        self._is_updated = True

    def synced(self, label: int | str | None) -> None:
        """Note that samplers get the learner's weights as they are now, under this label; None has no label."""
        self._version += self._is_updated
        self._is_updated = False
        if label is None:
            return
        self._of_label.pop(label, None)
        self._of_label[label] = self._version
        if len(self._of_label) > KEPT_LABELS:
            del self._of_label[next(iter(self._of_label))]

    def lags(self, *, restored: bool = False) -> dict[str, int]:
        """Return label → the lag of what was sampled under it, were it scored with the learner's weights of now.

        Args:
            restored: the learner scores with the weights of the last sync, whatever updates have followed.
        """
        now = self._version + (self._is_updated and not restored)
        return {str(label): now - version for label, version in self._of_label.items()}
