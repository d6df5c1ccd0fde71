"""The pages' figures are those that were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from integration.bench import monitor_table, write
from integration.pages.places import with_table

PAGES = {place.page for place in write.PLACES.values()}


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: str(page.relative_to(write.ROOT)))
def test_the_pages_are_written_from_the_evidence(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == write.written()[page], "run `python -m integration.bench.write`"


def test_what_is_said_beside_the_tables_is_what_was_measured() -> None:
    """The prose is written by hand; where it repeats a figure, the figure is the measured one."""
    results = json.loads(write.EVIDENCE.read_text(encoding="utf-8"))
    said = " ".join(write.BENCH_PAGE.read_text(encoding="utf-8").split())
    sanity, problems = results["sanity"], results["sanity"]["problems"]
    assert f"{sanity['settings']['steps']} steps" in said
    assert f"{problems['kept']} of {problems['drawn']} problems" in said
    assert f"{results['synthetic']['settings']['bits']} mantissa bit" in said
    assert f"{results['synthetic']['settings']['steps']} steps" in said
    ratio = sanity["summary"]["grpo"]["ratio"]
    assert f"{ratio['min']:.1f} to {ratio['max']:.1f} times" in said
    assert _noise_hides(results["gradient"])


def test_every_planted_cause_was_named_as_the_page_says() -> None:
    pytest.importorskip("ray")
    from integration.bench.monitor_runs import CAUSES

    named = json.loads(write.MONITOR.read_text(encoding="utf-8"))["causes"]
    assert named == {planted: cause.cause for planted, cause in CAUSES.items()}
    assert len(named) == 1 + 10 and "All ten planted causes were named" in write.MONITOR_PAGE.read_text(
        encoding="utf-8"
    )


def _noise_hides(gradient: Mapping[str, Any]) -> bool:
    dtypes = ("bf16", "fp16")
    return all(gradient[dtype]["sampling_noise"] > gradient[dtype]["importance_effect"] for dtype in dtypes)


def test_all_evidence_says_what_it_is_made_of() -> None:
    results = json.loads(write.EVIDENCE.read_text(encoding="utf-8"))
    for found in (*results.pop("offline", {}).values(), *results.values()):
        assert {"command", "seed", "releases", "machine"} <= found["made_of"].keys()


def test_a_page_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the table 'offline'"):
        with_table("# a page", "| a |", "offline")


def test_only_what_is_between_the_marks_changes() -> None:
    page = "before\n<!-- one -->\n| old |\n<!-- /one -->\nbetween\n<!-- two -->\n<!-- /two -->\nafter\n"
    assert with_table(page, "| new |\n", "one") == page.replace("old", "new")


def test_a_section_that_was_not_measured_is_an_empty_table(tmp_path: Path) -> None:
    results = tmp_path / "evidence.json"
    results.write_text("{}")
    assert write.Place(write.BENCH_PAGE, results, "sanity", write.sanity).table() == ""


def test_a_monitor_that_reached_training_is_said_to_have() -> None:
    rows = list(monitor_table.rows({"faults": {"NaN": True, "disk full": False}, "step_ratio": 1.0}))
    assert rows[-1] == "| planted accidents that reached training: NaN, disk full | 1 of 2: NaN |"
    assert not any("observe" in row for row in rows)
