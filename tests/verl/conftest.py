"""verl in this process, on a CPU, with or without a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("verl")

import fp16_patch
from fp16_patch import Plan


@pytest.fixture(autouse=True)
def nothing_stays_active() -> Iterator[None]:
    yield
    fp16_patch.deactivate()


@pytest.fixture
def activated() -> Callable[..., Plan]:
    """Activate a plan for the rest of the test."""

    def activate(**settings: Any) -> Plan:
        return fp16_patch.activate(Plan(**settings))

    return activate


@pytest.fixture
def compose() -> Callable[..., Any]:
    """The configuration verl's own command line composes from these overrides."""
    from hydra import compose, initialize_config_module

    def composed(*overrides: str) -> Any:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])

    return composed
