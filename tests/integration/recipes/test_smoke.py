"""Every recipe starts, in its smallest form."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from integration import recipes
from tests.integration.smokes import runnable


@pytest.mark.parametrize("name", runnable(recipes))
def test_it_runs_in_its_smallest_form(name: str, start_smoke: Callable[[str], str]) -> None:
    assert "no data for" not in start_smoke(f"integration.recipes.{name}")
