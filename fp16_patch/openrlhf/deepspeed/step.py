"""DeepSpeed's optimizer steps under the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fp16_patch.openrlhf.deepspeed.engines import inner
from fp16_patch.openrlhf.deepspeed.finite_norm import FiniteNormsOnly
from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.scaling.retry import RepeatableUpdate
from fp16_patch.scaling.scaler import StepOutcome, nonfinite_parameters

_GROWN = "_fp16_patch_grown"
# Steps that DeepSpeed has counted, taken or not.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# Where DeepSpeed's optimizers keep FP32 masters: ZeRO 1 and 2, ZeRO 3, without ZeRO.
_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat", "fp32_groups")


class DeepSpeedStep(RepeatableUpdate):
    """The steps of a DeepSpeed engine, which has a loss scaler of its own.

    Attributes:
        micro_batches: of the update in progress, each of which can be computed again.
    """

    def __init__(self, engine: Any, role: str = "actor") -> None:
        super().__init__(engine, role)
        self.micro_batches: list[Any] = []
        self._counters: dict[str, Any] = {}
        self._at_floor = self._norm_refused = False

    def loss_scale(self) -> float | None:
        return float(self.engine.optimizer.loss_scale) if self.engine.fp16_enabled() else None

    def set_loss_scale(self, scale: float) -> None:
        self.engine.optimizer.loss_scaler.cur_scale = scale

    def take(self, step: Callable[[], Any]) -> None:
        self._counters = {name: getattr(self.engine, name) for name in _COUNTERS if hasattr(self.engine, name)}
        self._at_floor = self._norm_refused = False
        try:
            self._step_with_finite_norms(step)
        except Exception as failure:
            # DeepSpeed's own end of the run says neither which role, nor which step, nor which parameter.
            self._at_floor = current_plan().overrides_dtype and "already at minimum" in str(failure)
            if not self._at_floor:
                raise
        _grow(self.engine.optimizer)

    def _step_with_finite_norms(self, step: Callable[[], Any]) -> None:
        if not current_plan().overrides_dtype:
            step()
            return
        with FiniteNormsOnly(self.engine.optimizer) as guard:
            step()
        if guard.refused:
            self._norm_refused = True
            # The scale was adapted before the norm was known.
            scaler = self.engine.optimizer.loss_scaler
            vars(scaler).pop(_GROWN, None)
            scaler.update_scale(True)

    def outcome_of(self, returned: Any, scale_before: float | None) -> StepOutcome:
        norm = math.inf if self._norm_refused else self.engine.get_global_grad_norm()
        skipped = self._at_floor or self.engine.skipped_steps > self._counters["skipped_steps"]
        return StepOutcome(self.loss_scale(), skipped, 0.0 if norm is None else float(norm))

    def rollback_counters(self) -> None:
        for name, value in self._counters.items():
            setattr(self.engine, name, value)

    def module(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module

    def nonfinite_gradients(self) -> list[str]:
        return nonfinite_parameters(_local_gradients(self.engine))

    def note_dtypes(self) -> None:
        gradients = {gradient.dtype for _, gradient in _local_gradients(self.engine)}
        # Offloaded gradients are out of reach; this is what DeepSpeed was told to keep them in.
        ledger().note(self.role, "gradient", *(gradients or {self.engine.get_data_types()[1]}))
        masters = next((groups for name in _MASTERS if (groups := getattr(self.engine.optimizer, name, None))), ())
        ledger().note(self.role, "master", *(master.dtype for master in masters))


def optimizer_step(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> None:
    """`DeepspeedStrategy.optimizer_step`, called for every micro-batch: record the step at an update's last."""
    engine = inner(argument(wrapped, args, kwargs, "model"))
    if engine.is_gradient_accumulation_boundary():
        DeepSpeedStep.of(engine).run(lambda: wrapped(*args, **kwargs))
    else:
        wrapped(*args, **kwargs)


def update_scale(wrapped: Any, scaler: Any, args: Any, kwargs: Any) -> None:
    """DeepSpeed's `DynamicLossScaler.update_scale`: let the scale grow after the step, not in it.

    DeepSpeed updates the scale first and unscales the gradients with the new one, so an update at which the scale
    doubles is taken with half its gradient.
    """
    before = scaler.cur_scale
    wrapped(*args, **kwargs)
    if current_plan().overrides_dtype and scaler.cur_scale > before:
        setattr(scaler, _GROWN, scaler.cur_scale)
        scaler.cur_scale = before


def _grow(optimizer: Any) -> None:
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, _GROWN):
        scaler.cur_scale = vars(scaler).pop(_GROWN)


def _local_gradients(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and this rank's reduced gradient of every parameter it has a share of; none when offloaded."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = getattr(optimizer, "params_in_partition", None) or getattr(optimizer, "fp16_groups", [])
    for index, gradients in getattr(optimizer, "averaged_gradients", {}).items():
        # A partition may end in padding that belongs to no parameter.
        for parameter, gradient in zip(groups[index], gradients or (), strict=False):
            if gradient is not None:
                yield names.get(id(parameter), f"group {index}"), gradient
