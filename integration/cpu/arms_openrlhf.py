"""The arms of a comparison on OpenRLHF: how a user would ask for each precision, and nothing else that differs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from integration.cpu.launch_openrlhf import OpenRLHFConfig

RUN = (str(Path(sys.executable).with_name("fp16-patch")), "run")
# Measures a run and changes nothing in it. OpenRLHF has no plugins: the environment alone would reach vLLM only.
OBSERVED = (*RUN, "--mode", "observe", "--")


@dataclass(frozen=True)
class Arm:
    """One way to run OpenRLHF: a command in front, arguments behind; the error it ends in, if it does."""

    name: str
    prefix: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    error: str | None = None

    def applied_to(self, config: OpenRLHFConfig, out: Path) -> OpenRLHFConfig:
        return replace(
            config,
            out=out,
            prefix=(*self.prefix, *config.prefix),
            extra=(*config.extra, *self.extra),
        )


ARMS = {
    arm.name: arm
    for arm in (
        Arm("bf16", OBSERVED),
        # OpenRLHF's own flag. The sampler stays in bfloat16 and, after a step, refuses the learner's weights.
        Arm("stock-fp16", OBSERVED, ("--ds.param_dtype", "fp16"), error="mismatch dtype"),
        # The one prefix.
        Arm("fp16_patch", (*RUN, "--")),
    )
}
