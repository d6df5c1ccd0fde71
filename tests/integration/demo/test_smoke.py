"""Every part of the demos starts, in its smallest form."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("pandas")
pytest.importorskip("verl")

from integration import demo
from tests.integration.smokes import runnable

TIMEOUT_S = 900
# Borrows a run of OpenRLHF from the tests that start one.
ELSEWHERE = {"run_openrlhf": "tests/e2e/test_openrlhf_runs.py"}


@pytest.mark.verl
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("name", [name for name in runnable(demo) if name not in ELSEWHERE])
def test_it_runs_in_its_smallest_form(name: str, start_smoke: Callable[[str], str]) -> None:
    assert "nothing is kept" in start_smoke(f"integration.demo.{name}")
