"""The probe's page: what was measured, and the paper's plots, in one file."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("plotly")

from fp16_patch.probe.page import write_page
from fp16_patch.probe.result import ProbeResult
from integration.cpu import tiny_families
from tests.mismatch.report.pages import MOST_BYTES, Page


def test_the_page_has_the_figures_and_needs_nothing_else(probed: Callable[..., ProbeResult], tmp_path: Path) -> None:
    result = probed(next(iter(tiny_families.FAMILIES)), dtypes=("fp32", "fp16"))
    write_page(result, tmp_path / "probe.html")
    page = Page.read(tmp_path / "probe.html")

    assert page.open == []
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.seen)
    assert len(page.whole.encode()) < MOST_BYTES
    assert f"<strong>Recommended: {result.recommendation.precision}</strong>" in page.own
    for heading in (
        "What was measured",
        "Sampler's probability against",
        "Σd against the length",
        "Where the gap lies",
    ):
        assert f"<h2>{heading}" in page.own
    # Pairs of one dtype on both sides: a map each, and a line each in the charts.
    pairs = ("fp32/fp32", "fp16/fp16")
    maps = [label for label, _ in page.figures if " against " in label]
    assert maps == [
        *(f"{pair}: learner's probability against sampler's probability" for pair in pairs),
        *(f"{pair}: Σd (nats) against sampled tokens" for pair in pairs),
    ]
    assert page.points("Distribution of |d|", "fp16/fp16")

    odd = "[/b] \x1b]0;title\x07 \0 \u202e"
    texts = {"reasons": (odd,), "warnings": (odd,), "fp32_modules": (odd,)}
    named = replace(
        result,
        model={**result.model, "path": f"/models/{odd}"},
        recommendation=replace(result.recommendation, **texts),
        refusals={odd: odd},
    )
    write_page(named, tmp_path / "odd.html")
    own = Page.read(tmp_path / "odd.html").own
    assert own.count(r"[/b] \x1b]0;title\x07 \x00 \u202e") >= 7
    assert {each for each in own if unicodedata.category(each) in ("Cc", "Cf", "Cs")} <= {"\n"}
