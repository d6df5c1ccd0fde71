"""The loss scaler's settings, the outcome of each optimizer step, and the line between calibration and collapse.

The scalers are torch's. What is added is what they leave out: the settings of the plan, a floor, a record of what
happened, and state to save.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp16_patch.plan.plan import Plan
from fp16_patch.plan.settings import FIRST_SCALE, HIGHEST_SCALE
from fp16_patch.scaling.saved_state import HISTORY, is_scale

if TYPE_CHECKING:
    import torch
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

MAX_CULPRITS = 3

LARGEST_SCALE = FIRST_SCALE
"""A run that has room for more finds it by growing."""

GRADIENT_MARGIN = 8.0
"""The first updates' largest gradient may be so many times the one that was seen: advantages go up to about 4."""


def fitting_scale(headroom: float) -> float:
    """Return the first loss scale for gradients that, unscaled, fit so many times into FP16's range: a power of two.

    At most `LARGEST_SCALE`, with room for gradients `GRADIENT_MARGIN` times as large, at least 1.
    """
    fits = min(LARGEST_SCALE, headroom / GRADIENT_MARGIN)
    return 2.0 ** math.floor(math.log2(fits)) if fits >= 1 else 1.0


def sharded_scaler(plan: Plan, device: str) -> ShardedGradScaler:
    """Make torch's scaler for sharded gradients, with the plan's settings, on the device that computes them.

    Args:
        device: device type, as `cuda`, `npu` or `cpu`. torch's default is `cuda`, and on any other machine the scaler
            then silently disables itself.
    """
    from fp16_patch.scaling.norm_first import PatientScaler

    scaler = PatientScaler(
        device=device,
        init_scale=plan.init_scale,
        growth_factor=plan.growth_factor,
        backoff_factor=plan.backoff_factor,
        growth_interval=plan.growth_interval,
    )
    if not scaler.is_enabled():
        raise RuntimeError(
            f"torch disabled its gradient scaler on device {device!r}, and FP16 training needs one. Fix: train where "
            "torch.amp has that device, or with FP16_PATCH=bf16"
        )
    return scaler


@dataclass(frozen=True)
class StepOutcome:
    """What became of one optimizer step.

    Attributes:
        loss_scale: the scale of the next step; None without a scaler.
        skipped: the step was not taken, its gradients were not finite.
        grad_norm: norm of the unscaled gradients before clipping; not finite when skipped.
    """

    loss_scale: float | None
    skipped: bool
    grad_norm: float


@dataclass
class StepHistory:
    """Outcomes of one engine's optimizer steps: what is logged, what is saved, and when it is enough.

    Attributes:
        attempted: optimizer steps tried.
        skipped_total: steps not taken.
        consecutive_skips: steps not taken since the last one taken.
        taken_since_lr: whether the LR scheduler may advance.
        retries_since_lr: attempts that overflowed and were repeated at a lower scale, since the schedule was last asked
            to advance: those of an update.
        retries_total: all of them. A repeated attempt is neither attempted nor skipped.
    """

    attempted: int = 0
    skipped_total: int = 0
    consecutive_skips: int = 0
    taken_since_lr: bool = False
    retries_since_lr: int = 0
    retries_total: int = 0
    last: StepOutcome | None = None

    @property
    def calibrating(self) -> bool:
        """No step was taken yet: the scale is still looking for its level."""
        return self.skipped_total == self.attempted

    def add(self, outcome: StepOutcome) -> None:
        """Count a step that was taken, or skipped for good."""
        self.attempted += 1
        self.last = outcome
        if outcome.skipped:
            self.skipped_total += 1
            self.consecutive_skips += 1
        else:
            self.consecutive_skips = 0
            self.taken_since_lr = True

    def add_retry(self) -> None:
        self.retries_since_lr += 1
        self.retries_total += 1

    def lr_may_advance(self) -> bool:
        """Return whether the LR schedule, which counts updates, may advance: if a step was taken since it last did.

        Asked once each time the framework would advance it. Before the first attempt it may: then a checkpoint is being
        loaded, which goes forward by as many steps as it had taken.
        """
        self.retries_since_lr = 0
        if self.attempted and not self.taken_since_lr:
            return False
        self.taken_since_lr = False
        return True

    def metrics(self) -> dict[str, float]:
        """Return `fp16/*` of the last step; `step_skipped` 0 or 1, `loss_scale` and `retries` only with a scaler."""
        if self.last is None:
            return {}
        return {
            **({} if self.last.loss_scale is None else self._of_the_scale(self.last.loss_scale)),
            "fp16/step_skipped": float(self.last.skipped),
            "fp16/skipped_total": float(self.skipped_total),
            "fp16/consecutive_skips": float(self.consecutive_skips),
        }

    def _of_the_scale(self, scale: float) -> dict[str, float]:
        return {
            "fp16/loss_scale": scale,
            "fp16/retries": float(self.retries_since_lr),
            "fp16/retries_total": float(self.retries_total),
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in HISTORY}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, here or in an earlier release; other names are left alone."""
        for name in HISTORY.keys() & state.keys():
            setattr(self, name, state[name])


def scale_of(scaler: Any) -> float | None:
    """Return the loss scale in force; None without a scaler, or with one that torch has disabled."""
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None


def set_scale(scaler: Any, scale: float) -> None:
    """Go on at this scale, also before the scaler has scaled anything.

    Raises:
        ValueError: it is none.
    """
    if not is_scale(scale):
        raise ValueError(f"{scale} is no loss scale: it has to be a positive number that FP32 holds")
    scaler.load_state_dict({**scaler.state_dict(), "scale": float(scale)})


def usable_scale(scale: float, plan: Plan) -> float:
    """Return the scale to go on with from this one: within its bounds, or the plan's first where this one is none."""
    return min(max(scale, plan.min_scale), HIGHEST_SCALE) if 0 < scale < math.inf else plan.init_scale


def at_floor(scale: float | None, plan: Plan) -> bool:
    """Return whether it is the lowest scale allowed; one that is none, as NaN or 0, says nothing of the gradients."""
    return scale is not None and 0 < scale <= plan.min_scale


def step_outcome(
    scaler: Any, scale_before: float | None, grad_norm: float, *, needs_finite_norm: bool = True
) -> StepOutcome:
    """Return what became of a step that torch's scaler took or skipped; without one, of a step skipped by its norm.

    Args:
        scaler: torch's, or None.
        scale_before: the loss scale that the gradients were computed with.
        grad_norm: norm of the unscaled gradients before clipping.
        needs_finite_norm: no step was taken whose norm is not finite. torch's scaler alone looks at each gradient, and
            takes one whose norm overflows in their sum.
    """
    scale, finite = scale_of(scaler), math.isfinite(grad_norm)
    if scaler is None or scale is None or scale_before is None:
        # A scaler that torch has disabled skips nothing.
        return StepOutcome(scale, scaler is None and not finite, grad_norm)
    # torch lowers the scale after an overflow and never otherwise; one that is none, as NaN or 0, cannot fall.
    skipped = scale < scale_before or (not finite and (needs_finite_norm or not is_scale(scale_before)))
    return StepOutcome(scale, skipped, grad_norm)


def collapse_reason(plan: Plan, history: StepHistory, scale_before: float | None) -> str | None:
    """Return why the run must stop after a skipped step, or None while skips are still calibration.

    Args:
        scale_before: the loss scale the skipped step was computed with; None without a scaler.
    """
    if history.last is None or not history.last.skipped:
        return None
    if at_floor(scale_before, plan):
        return f"overflow at the smallest loss scale allowed (setting min_scale={plan.min_scale:g})"
    if history.consecutive_skips >= plan.max_consecutive_skips:
        return (
            f"{history.consecutive_skips} optimizer steps in a row were skipped "
            f"(setting max_consecutive_skips={plan.max_consecutive_skips})"
        )
    return None


def nonfinite_parameters(named_gradients: Iterable[tuple[str, torch.Tensor]], limit: int = MAX_CULPRITS) -> list[str]:
    """Return the names of the first parameters whose gradient holds inf or NaN."""
    culprits = []
    for name, gradient in named_gradients:
        if not gradient.detach().isfinite().all():
            culprits.append(name)
        if len(culprits) == limit:
            break
    return culprits
