"""The versions of the weights: a lag counts weights that differ, whatever a framework calls its syncs."""

from __future__ import annotations

from fp16_patch.runtime.weight_versions import KEPT_LABELS, WeightVersions


def trained(steps: int, versions: WeightVersions | None = None) -> WeightVersions:
    """A trainer that syncs at its start, and after each update."""
    versions = versions or WeightVersions()
    versions.synced(0)
    for step in range(1, steps + 1):
        versions.updated()
        versions.synced(step)
    return versions


def test_what_was_sampled_before_an_update_lags_behind_it() -> None:
    assert trained(3).lags() == {"0": 3, "1": 2, "2": 1, "3": 0}


def test_two_labels_of_the_same_weights_are_one_version() -> None:
    # Syncs come before the update of a step, as those of verl's one-step-off trainer: labels 0 and 1 are one policy.
    versions = WeightVersions()
    versions.synced(0)
    versions.synced(1)
    assert versions.lags() == {"0": 0, "1": 0}
    versions.updated()
    versions.synced(2)
    assert versions.lags() == {"0": 1, "1": 1, "2": 0}


def test_updates_that_samplers_have_not_got_yet_are_one_version_ahead() -> None:
    versions = trained(1)
    versions.updated()
    versions.updated()
    assert versions.lags() == {"0": 2, "1": 1}
    assert versions.lags(restored=True) == {"0": 1, "1": 0}


def test_a_label_that_is_used_again_stands_for_the_newer_weights() -> None:
    versions = trained(1)
    versions.updated()
    versions.synced(1)
    assert versions.lags() == {"0": 2, "1": 0}


def test_a_sync_without_a_label_is_a_version_all_the_same() -> None:
    versions = trained(0)
    versions.updated()
    versions.synced(None)
    assert versions.lags() == {"0": 1}


def test_labels_of_long_ago_are_forgotten() -> None:
    lags = trained(KEPT_LABELS + 10).lags()
    assert len(lags) == KEPT_LABELS
    assert "0" not in lags
