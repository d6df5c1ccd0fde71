"""The arms of a comparison: how a user would ask for each precision, and nothing else that differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from integration.cpu.launch import LaunchConfig

# Measures a run and changes nothing in it.
OBSERVED = {"FP16_PATCH": "observe"}


@dataclass(frozen=True)
class Arm:
    """One way to run verl: hydra overrides and environment."""

    name: str
    overrides: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def applied_to(self, config: LaunchConfig, out: Path) -> LaunchConfig:
        return replace(config, out=out, overrides=(*config.overrides, *self.overrides), env={**config.env, **self.env})


ARMS = {
    arm.name: arm
    for arm in (
        Arm("bf16", env=OBSERVED),
        # The keys verl's documentation names. The learner ignores the first.
        Arm(
            "stock-fp16",
            (
                "actor_rollout_ref.actor.fsdp_config.dtype=float16",
                "actor_rollout_ref.ref.fsdp_config.dtype=float16",
                "actor_rollout_ref.rollout.dtype=float16",
            ),
            OBSERVED,
        ),
        # The same where Megatron learns. It reads them all.
        Arm(
            "stock-fp16-megatron",
            (
                "actor_rollout_ref.actor.megatron.dtype=float16",
                "actor_rollout_ref.ref.megatron.dtype=float16",
                "actor_rollout_ref.rollout.dtype=float16",
            ),
            OBSERVED,
        ),
        # The one key the learner reads, which verl's documentation does not name.
        Arm(
            "switched-fp16",
            (
                "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp16",
                "actor_rollout_ref.rollout.dtype=float16",
            ),
            OBSERVED,
        ),
        # The one flag.
        Arm("fp16_patch", ("actor_rollout_ref.model.external_lib=fp16_patch.verl",)),
    )
}


DEMONSTRATED = ("bf16", "stock-fp16", "fp16_patch")
DEMONSTRATED_ASYNCHRONOUS = ("bf16", "fp16_patch")
DEMONSTRATED_ON_MEGATRON = ("bf16", "stock-fp16-megatron", "fp16_patch")


def record_of(out: Path) -> Path:
    """Where the monitor of a run started with `out` writes."""
    return out / "checkpoints" / "fp16_patch"
