"""verl in this process, on a CPU, with or without a plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("verl")

import fp16_patch
from fp16_patch import Plan


@pytest.fixture(scope="session", autouse=True)
def verl_on_a_cpu() -> None:
    from integration.cpu.launch import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    import verl  # noqa: F401  (reads the environment as it is imported)


@pytest.fixture
def activated(verl_on_a_cpu: None) -> Iterator[Callable[..., Plan]]:
    """Activate a plan for the rest of the test."""

    def activate(**settings: Any) -> Plan:
        return fp16_patch.activate(Plan(**settings))

    yield activate
    fp16_patch.deactivate()


@pytest.fixture
def compose(verl_on_a_cpu: None) -> Callable[..., Any]:
    """The configuration verl's own command line composes from these overrides."""
    from hydra import compose, initialize_config_module

    def composed(*overrides: str) -> Any:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])

    return composed
