"""The table of settings: each is declared here, once; its parsing, checks and pages follow from that.

`python -m integration.pages.settings` writes `README.md` from it, `fp16-patch settings` prints it with the values in
force.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fp16_patch.plan.dtypes import DTYPES, FLOAT16
from fp16_patch.plan.setting import (
    FALSE_WORDS,
    TRUE_WORDS,
    Choice,
    Modes,
    PathText,
    Range,
    Setting,
    above,
    between,
    setting,
)

DTYPE_OF_MODE = {**{dtype.short: dtype.torch for dtype in DTYPES}, "observe": None, "off": None}
"""Torch's name of the dtype that a mode decides; None if it decides none."""
FIRST_SCALE = 65536.0
"""The first loss scale of torch and of DeepSpeed."""
LOWEST_SCALE, HIGHEST_SCALE = 2.0**-126, 2.0**126
"""Between them a scale and its reciprocal are normal numbers of FP32, which scalers keep them in."""
MOST_STEPS = 2**31 - 1
"""Counters of torch's scaler and of frameworks have 32 bits."""

_OTHER_WORDS = {
    **{dtype.torch: dtype.short for dtype in DTYPES},
    **dict.fromkeys((FLOAT16.method, *TRUE_WORDS), FLOAT16.short),
    **dict.fromkeys(("", *FALSE_WORDS), "off"),
}
"""Word → the mode that it stands for."""

_PRECISION, _SCALE, _PROOF = "Precision", "Loss scale", "Checks"
_MONITOR, _ALERTS = "Mismatch monitor", "Alerts"
_VERL_FSDP = "verl's FSDP engine"
_VERL_ENGINES = "verl's FSDP and Megatron engines"
_RETRYING = f"{_VERL_ENGINES}, OpenRLHF's PPO"
_RL = "RL runs"
# From the highest scale to the lowest it takes 252 halvings.
_MOST_TRIES = 1000
_SCALES = Range(between(LOWEST_SCALE, HIGHEST_SCALE), "a scale of 2⁻¹²⁶ to 2¹²⁶")
_THRESHOLD = Range(between(0, sys.float_info.max), "a finite threshold of 0 (no such alert) or above")


def _counted(things: str, least: int = 1, most: int = MOST_STEPS, zero: str | None = None) -> Range:
    return Range(between(least, most), f"{least} to {most} {things}", zero)


@dataclass(frozen=True)
class Settings:
    """Every setting of a plan, in the order in which they are listed."""

    mode: str = setting(
        "fp16",
        "`fp16`, `bf16` and `fp32` put every role in that dtype; `observe` changes nothing and measures; "
        "`off` does nothing",
        group=_PRECISION,
        check=Modes(DTYPE_OF_MODE),
        aliases=_OTHER_WORDS,
    )
    probe: str | None = setting(
        None,
        "file that `fp16-patch probe` wrote: the run starts at the loss scale measured there, and does not start if "
        "the model was found unsafe in FP16",
        group=_PRECISION,
        check=PathText(),
    )
    init_scale: float = setting(
        FIRST_SCALE,
        "first loss scale; giving one sets `first_scale=fixed`",
        group=_SCALE,
        default_text="measured, else 65536",
        check=_SCALES,
    )
    first_scale: str = setting(
        "measured",
        "`measured` starts where the gradients of the first mini-batch fit, `fixed` at `init_scale`",
        group=_SCALE,
        where=_VERL_ENGINES,
        check=Choice(("measured", "fixed"), "start"),
    )
    growth_interval: int = setting(
        400,
        "optimizer steps without overflow before the scale grows",
        group=_SCALE,
        check=_counted("steps"),
    )
    growth_factor: float = setting(
        2.0,
        "factor by which the scale grows (DeepSpeed: 2 only)",
        group=_SCALE,
        check=Range(between(1.001, 1024), "a factor of 1.001 to 1024"),
    )
    backoff_factor: float = setting(
        0.5,
        "factor by which an overflow lowers the scale (DeepSpeed: 0.5 only)",
        group=_SCALE,
        check=Range(between(0.001, 0.999), "a factor of 0.001 to 0.999"),
    )
    hysteresis: int = setting(
        1,
        "overflows before the scale is lowered; torch's scaler lowers it at the first",
        group=_SCALE,
        where="DeepSpeed, Megatron",
        check=_counted("overflows", most=_MOST_TRIES),
    )
    min_scale: float = setting(
        1.0,
        "floor of the scale. An overflow there stops the run; after the first step that was taken, only if the update "
        "began there",
        group=_SCALE,
        check=_SCALES,
    )
    on_overflow: str = setting(
        "retry",
        "`retry` computes the same mini-batch again at the lowered scale, `skip` drops it",
        group=_SCALE,
        where=_RETRYING,
        check=Choice(("retry", "skip"), "action"),
    )
    max_retries: int = setting(
        8,
        "retries of one optimizer step; then it is skipped",
        group=_SCALE,
        where=_RETRYING,
        check=_counted("retries", least=0, most=_MOST_TRIES, zero="none"),
    )
    scale_rule: str = setting(
        "ahead",
        "`ahead` lets the scale grow only if the gradients seen lately would fit at the larger scale; `torch` grows "
        "it after `growth_interval` steps in any case, as every other learner does",
        group=_SCALE,
        where=_VERL_ENGINES,
        check=Choice(("torch", "ahead"), "rule"),
    )
    gradient_look_every: int = setting(
        25,
        "optimizer steps between measurements of the FP16 gradients: the largest, and how many underflow. `ahead` "
        "takes its own in any case",
        group=_SCALE,
        where=_VERL_ENGINES,
        check=_counted("steps", least=0, zero="never"),
    )
    max_consecutive_skips: int = setting(
        20,
        "skipped steps in a row that stop the run",
        group=_SCALE,
        check=_counted("steps"),
    )
    fused_step: bool = setting(
        True,
        "run Adam and AdamW on torch's fused kernel, which unscales and clips in it: two passes over the gradients "
        "instead of five. A kernel named in `optim.override_optimizer_config` stays",
        group=_SCALE,
        where=_VERL_FSDP,
    )
    strict: bool = setting(
        True,
        "refuse framework code that no patch was written for; `false` makes that a warning. Environment only: "
        "`FP16_PATCH_STRICT=0`",
        group=_PROOF,
    )
    ledger_every: int = setting(
        50,
        "optimizer steps between checks of every process's dtypes. The first two updates are always checked",
        group=_PROOF,
        where=_RL,
        check=_counted("steps"),
    )
    out_dir: str | None = setting(
        None,
        "folder where the measurements go",
        group=_MONITOR,
        where=_RL,
        check=PathText(),
        default_text="`fp16_patch` in `trainer.default_local_dir` (verl), in `--ckpt.path` (OpenRLHF)",
    )
    monitor: bool = setting(True, "measure the mismatch of sampler and learner", group=_MONITOR, where=_RL)
    monitor_timeout_s: float = setting(
        2.0,
        "longest wait of a step for its own figures; without them it goes on",
        group=_MONITOR,
        where=_RL,
        check=Range(above(0, 3600), "a number of seconds above 0, at most 3600"),
    )
    noise_floor_every: int = setting(
        10,
        "steps between comparisons of the learner with itself",
        group=_MONITOR,
        where=_RL,
        check=_counted("steps", least=0, zero="never"),
    )
    noise_floor_share: float = setting(
        0.03,
        "share of the sequences that the learner scores once more for that",
        group=_MONITOR,
        where=_RL,
        check=Range(above(0, 1), "a share of the sequences, above 0 and at most 1"),
    )
    on_alert: str = setting(
        "log",
        "`log` writes an alert to log and record, `stop` ends the run as well",
        group=_ALERTS,
        where=_RL,
        check=Choice(("log", "stop"), "action"),
    )
    alert_k1: float = setting(0.1, "alert if |k1| is above", group=_ALERTS, where=_RL, check=_THRESHOLD)
    alert_ess: float = setting(
        0.3,
        "alert if the effective sample size, as a share of the tokens, is below",
        group=_ALERTS,
        where=_RL,
        check=_THRESHOLD,
    )
    alert_chi2: float = setting(
        1.0,
        "alert if the χ² divergence of the tokens' importance weights is above",
        group=_ALERTS,
        where=_RL,
        check=_THRESHOLD,
    )
    alert_token_mult_prob_error: float = setting(
        1.05, "alert if mean exp|d| is above", group=_ALERTS, where=_RL, check=_THRESHOLD
    )
    alert_prob_diff: float = setting(
        0.95,
        "alert if sampler and learner differ by more in the probability of some token",
        group=_ALERTS,
        where=_RL,
        check=_THRESHOLD,
    )
    alert_doubling_steps: int = setting(
        100,
        "alert if mean |d| has doubled within so many steps",
        group=_ALERTS,
        where=_RL,
        check=_counted("steps", least=0, zero="no such alert"),
    )
    alert_after: int = setting(
        2,
        "steps in a row beyond a threshold before its alert fires, and within it before it clears",
        group=_ALERTS,
        where=_RL,
        check=_counted("steps"),
    )


SETTINGS: Mapping[str, Setting] = {declared.name: Setting.of(declared) for declared in fields(Settings)}


def problems_of(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (setting, what is wrong with its value, the fix) for all that cannot be had."""
    found = {name: problem for name, each in SETTINGS.items() if (problem := each.problem(values[name])) is not None}
    yield from ((name, *problem) for name, problem in found.items())
    floor, first = values["min_scale"], values["init_scale"]
    if not found.keys() & {"min_scale", "init_scale"} and floor > first:
        yield "min_scale", "above init_scale", f"use at most init_scale={first}"
