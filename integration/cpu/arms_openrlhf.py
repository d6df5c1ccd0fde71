"""The arms of a comparison on OpenRLHF: how a user would ask for each precision, and nothing else that differs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from integration.cpu.arms import OBSERVED
from integration.cpu.launch_openrlhf import OpenRLHFConfig

FP16_PATCH = str(Path(sys.executable).with_name("fp16-patch"))


@dataclass(frozen=True)
class Arm:
    """One way to run OpenRLHF: a command in front, arguments behind, environment; the error it ends in, if it does."""

    name: str
    prefix: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    def applied_to(self, config: OpenRLHFConfig, out: Path) -> OpenRLHFConfig:
        return replace(
            config,
            out=out,
            prefix=(*self.prefix, *config.prefix),
            extra=(*config.extra, *self.extra),
            env={**config.env, **self.env},
        )


ARMS = {
    arm.name: arm
    for arm in (
        Arm("bf16", env=OBSERVED),
        # OpenRLHF's own flag. The sampler stays in bfloat16 and, after a step, refuses the learner's weights.
        Arm("stock-fp16", extra=("--ds.param_dtype", "fp16"), env=OBSERVED, error="mismatch dtype"),
        # The one prefix.
        Arm("fp16_patch", prefix=(FP16_PATCH, "run", "--")),
    )
}
