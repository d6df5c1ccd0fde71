"""What a step with an overflow on one rank, between two clean ones, has to look like in verl's metrics."""

from __future__ import annotations

from tests.ranks import Facts


def assert_each_rank_tells_of_the_skip(facts: Facts) -> None:
    def seen(metrics: str) -> list[set[float]]:
        names = ("loss_scale/min", "step_skipped", "skipped_total/max", "consecutive_skips/max")
        return [{value for [value] in facts[metrics][f"fp16/{name}"]} for name in names]

    assert seen("clean_metrics") == [{65536.0}, {0.0}, {0.0}, {0.0}]
    assert seen("overflow_metrics") == [{32768.0}, {1.0}, {1.0}, {1.0}]
    assert seen("last_metrics") == [{32768.0}, {0.0}, {1.0}, {0.0}]
