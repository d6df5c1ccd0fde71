"""verl's trainers: how each is started, and what it needs to be told besides what all of them are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from integration.cpu.launch import LaunchConfig

Trainer = Literal["sync", "colocate_async"]
Settings = dict[str, object]


@dataclass(frozen=True)
class EntryPoint:
    """What is run with ``python -m``, and how it is recognized that training begins."""

    module: str
    settings: Callable[[LaunchConfig], Settings]
    ready: re.Pattern[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def _sync(_config: LaunchConfig) -> Settings:
    # Added where a release has no such section, and unread there.
    return _replay_buffer("AttentiveReplayBuffer")


def _colocate_async(_config: LaunchConfig) -> Settings:
    return {"trainer.v1.trainer_mode": "colocate_async", **_replay_buffer("AttentiveReplayBufferAsync")}


def _replay_buffer(name: str) -> Settings:
    sampler = "++trainer.v1.sampler.custom_sampler"
    return {f"{sampler}.path": "pkg://verl_on_cpu.replay", f"{sampler}.name": name}


_V1_READY = re.compile(r"all initialize finished, ready to fit")

ENTRY_POINTS: Mapping[Trainer, EntryPoint] = {
    "sync": EntryPoint("verl.trainer.main_ppo", _sync, _V1_READY),
    "colocate_async": EntryPoint("verl.trainer.main_ppo", _colocate_async, _V1_READY),
}
