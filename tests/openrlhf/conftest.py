"""OpenRLHF in this process, on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest.importorskip("openrlhf")

import openrlhf_on_cpu  # noqa: F401

import fp16_patch
from integration.cpu import launch_openrlhf

os.environ.update({name: value for name, value in launch_openrlhf.ENVIRONMENT.items() if name.startswith("DS_")})


@pytest.fixture(autouse=True)
def nothing_stays_active() -> Iterator[None]:
    yield
    fp16_patch.deactivate()
