"""The README's figures are those that were measured."""

from __future__ import annotations

import json

import pytest

from integration.bench import write


def test_the_readme_is_written_from_the_evidence() -> None:
    assert write.README.read_text(encoding="utf-8") == write.written(), "run `python -m integration.bench.write`"


def test_all_evidence_says_what_it_is_made_of() -> None:
    results = json.loads(write.EVIDENCE.read_text(encoding="utf-8"))
    for found in (*results.pop("offline", {}).values(), *results.values()):
        assert {"command", "seed", "releases", "machine"} <= found["made_of"].keys()


def test_a_page_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the evidence"):
        write.with_table("# a page", "| a |")
