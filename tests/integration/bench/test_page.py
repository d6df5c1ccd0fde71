"""The page of plots and the README's tables, from a small evidence."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("plotly")

from fp16_patch.mismatch.report.charts import Chart
from fp16_patch.mismatch.report.plotly_figures import figure
from integration.bench import page, write
from tests.mismatch.report.pages import MOST_BYTES, Page

CURVES = {"reward": [0.2, None, 0.6], "mean_abs": [1e-3, 2e-3, 3e-3], "grad_norm": [1.0, 2.0, None]}
SPREAD = {"mean": 0.5, "min": 0.4, "max": 0.6}


def summary(separates: bool | None = False, seeds: int = 2) -> dict[str, Any]:
    arm = {"reward": SPREAD, "mean_abs": {"mean": 3.3e-3, "min": 3e-3, "max": 4e-3}, "start_reward": SPREAD}
    return {
        "bf16": arm,
        "fp16": {**arm, "mean_abs": {"mean": 3.6e-4, "min": 3e-4, "max": 4e-4}},
        "bf16 ÷ fp16": {str(seed): 9.0 + seed for seed in range(seeds)},
        "ratio": {"mean": 9.5, "min": 9.0, "max": 10.0},
        "reward_difference": 0.03,
        "reward_separates": separates if seeds > 1 else None,
    }


def sanity(separates: bool | None = False) -> dict[str, Any]:
    runs = {arm: {"0": {"curves": CURVES}, "1": {"curves": CURVES}} for arm in ("bf16", "fp16")}
    return {
        "settings": {"steps": 40},
        "problems": {"kept": 9, "drawn": 12, "low": 0.2, "high": 0.8},
        "algorithms": {"grpo": runs, "gspo": runs},
        "summary": {"grpo": summary(separates), "gspo": summary(seeds=1)},
    }


def ablation() -> dict[str, Any]:
    run = {"curves": CURVES, "mean_abs": 4e-3, "last_quarter": {"mean_abs": 3e-3, "reward": 0.6}}
    return {"settings": {"steps": 3}, "pairs": {"fp32/bf16": run, "bf16/bf16": run}}


EVIDENCE: dict[str, Any] = {
    "offline": {
        "dense": {**{pair: {"mean_abs": 1e-3} for pair in page.PAIRS}, "bf16 ÷ fp16": {"ratio": 9.1}},
    },
    "gradient": {dtype: dict.fromkeys(write.SHARES, 0.125) for dtype in ("fp32", "fp16", "bf16")},
    "synthetic": {
        "settings": {"bits": 1, "window": 2},
        "seeds": [0, 1],
        "arms": {"fp32": {"0": {"curves": CURVES}, "1": {"curves": CURVES}}},
    },
    "sanity": sanity(),
    "ablation": ablation(),
}


def test_the_page_shows_every_section_and_needs_nothing_else() -> None:
    drawn = Page.of(page.page(EVIDENCE))
    assert drawn.open == []
    assert drawn.own.count("<h2>") == 5
    # Reward and mismatch of one arm; three figures of two algorithms; mismatch and reward of the pairs.
    assert drawn.own.count("<figure>") == 2 + 6 + 2
    assert not any(word in drawn.own for word in ("http:", "https:", "nan"))
    assert not any({"src", "href"} & attributes.keys() for _, attributes in drawn.seen)
    assert len(drawn.whole.encode()) < MOST_BYTES


@pytest.mark.parametrize("section", EVIDENCE)
def test_a_section_that_was_not_measured_is_left_out(section: str) -> None:
    rest = {name: found for name, found in EVIDENCE.items() if name != section}
    assert page.page(rest).count("<h2>") == 4
    assert page.page({section: EVIDENCE[section]}).count("<h2>") == 1


def areas(chart: Chart) -> list[Any]:
    return [trace for trace in figure(chart).data if trace.fill]


def test_a_band_is_drawn_where_there_are_seeds() -> None:
    several = page.over_seeds("x", {"bf16": {"0": CURVES, "1": CURVES}}, "mean_abs", 1)
    one = page.over_seeds("x", {"bf16": {"0": CURVES}}, "mean_abs", 1)
    assert ([trace["fill"] for trace in areas(several)], areas(one)) == (["toself"], [])
    assert several.lines[0].points == one.lines[0].points == {1.0: 1e-3, 2.0: 2e-3, 3.0: 3e-3}


def test_averages_begin_where_there_are_so_many_steps() -> None:
    assert page.averaged([0.2, None, 0.6, 0.8], 2) == pytest.approx({2.0: 0.2, 3.0: 0.6, 4.0: 0.7})
    assert page.averaged([0.2, None], 1) == {1.0: 0.2}
    assert page.averaged([], 2) == {}


def test_a_run_that_has_no_such_curve_has_an_empty_chart() -> None:
    chart = page.over_seeds("x", {"bf16": {"0": {"reward": []}}}, "reward", 5)
    (trace,) = figure(chart).data
    assert (trace.name, trace.x, trace.y) == ("bf16", (), ())


def test_the_tables_say_whether_the_reward_separates() -> None:
    table = "\n".join([*write.sanity(sanity()), *write.ablation(ablation())])
    assert "| grpo | 3.3e-03 | 3.6e-04 | **9.0**, **10.0** | 0.50 | 0.50 |" in table
    assert "| +0.03 | bf16 0.40 – 0.60, fp16 0.40 – 0.60 |" in table
    assert "| fp32 learner | – | – | 4.0e-03 |" in table
    verdict = write.sanity_verdict(sanity())
    assert (
        "The reward does not decide between the two at this size (grpo, 2 seeds: BF16 0.40 to 0.60 and FP16" in verdict
    )
    assert "the mismatch does, by 9.0 to 10.0 times. Of the algorithms of one seed FP16's reward differs" in verdict
    assert "and the ranges overlap" in verdict
    # Two runs an arm: of the six orders they can come in, two keep the arms apart.
    assert "without overlap, as happens by chance in 33%" in write.sanity_verdict(sanity(separates=True))
