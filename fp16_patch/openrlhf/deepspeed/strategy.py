"""DeepSpeed as OpenRLHF drives it: its configuration, its engines' dtypes, and what becomes of each optimizer step."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fp16_patch.openrlhf.config import arguments
from fp16_patch.patching.call_arguments import argument, bound, takes
from fp16_patch.runtime import preflight, propagation, rope
from fp16_patch.runtime.activation import attestation, current_plan, ledger
from fp16_patch.runtime.carried_plan import CarriedPlan
from fp16_patch.runtime.compute_dtypes import watch_compute
from fp16_patch.scaling.optimizer_step import WatchedEngine, history_of
from fp16_patch.scaling.scaler import nonfinite_parameters

logger = logging.getLogger(__name__)

_ROLE = "_fp16_patch_role"
_NORMS = "_fp16_patch_norms"
_GROWN = "_fp16_patch_grown"
# Steps that DeepSpeed has counted, taken or not.
_COUNTED = ("global_steps", "global_samples", "skipped_steps")
# Where DeepSpeed's optimizers keep FP32 masters: ZeRO 1 and 2, ZeRO 3, without ZeRO.
_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat", "fp32_groups")


def init(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> None:
    """`DeepspeedStrategy.__init__`: the plan meets the command line, and rides along wherever the strategy is sent."""
    run = argument(wrapped, args, kwargs, "args")
    plan = current_plan()
    arguments.check(run, plan)
    changed = arguments.apply_to(run, plan) if plan.overrides_dtype else []
    if changed and os.environ.get("RANK", "0") == "0":
        flags = "\n  ".join(changed)
        logger.warning("every role computes in %s; the command line said otherwise:\n  %s", plan.dtype, flags)
    call = bound(wrapped, args, kwargs)
    if changed and takes(wrapped, "bf16"):
        # Up to 0.9.1 it is given beside the arguments, which say it, too.
        call.arguments["bf16"] = run.bf16
    wrapped(*call.args, **call.kwargs)
    strategy.fp16_patch = CarriedPlan(plan)
    ledger().kind = "driver"
    propagation.carry_driver_record(attestation())


def setup_distributed(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> Any:
    """`DeepspeedStrategy.setup_distributed`: from here on this process is a learner's rank."""
    result = wrapped(*args, **kwargs)
    ledger().kind, ledger().rank = "worker", torch.distributed.get_rank()
    return result


def train_config(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`DeepspeedStrategy.get_ds_train_config`: the scaler's settings, gradients reduced in FP32.

    OpenRLHF writes `{"enabled": true}` and leaves the rest to DeepSpeed's defaults, which differ between releases.
    """
    config: dict[str, Any] = wrapped(*args, **kwargs)
    plan = current_plan()
    if plan.overrides_dtype:
        config["communication_data_type"] = "fp32"
        _say_dtype(config)
    if plan.scales_loss:
        config["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": int(math.log2(plan.init_scale)),
            "loss_scale_window": plan.growth_interval,
            "hysteresis": plan.hysteresis,
            "min_loss_scale": int(plan.min_scale),
        }
    return config


def eval_config(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`DeepspeedStrategy.get_ds_eval_config` up to 0.9.1, which knows bf16 or nothing: models that only run forward."""
    config: dict[str, Any] = wrapped(*args, **kwargs)
    if current_plan().overrides_dtype:
        _say_dtype(config)
    return config


def _say_dtype(config: dict[str, Any]) -> None:
    plan = current_plan()
    config["bf16"], config["fp16"] = {"enabled": plan.dtype == "bfloat16"}, {"enabled": plan.dtype == "float16"}


def init_train_model(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> Any:
    """`DeepspeedStrategy._ds_init_train_model`: RoPE back in FP32; the ledger watches the engine compute."""
    model = argument(wrapped, args, kwargs, "model")
    role = "actor" if _is_actor(model) else _regression_role()
    prepared = wrapped(*args, **kwargs)
    _watch(prepared[0], role)
    return prepared


def init_eval_model(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> Any:
    """`DeepspeedStrategy._ds_init_eval_model`: the same for models that only run forward."""
    model = argument(wrapped, args, kwargs, "model")
    if not model:
        return wrapped(*args, **kwargs)
    prepared = wrapped(*args, **kwargs)
    _watch(prepared, _frozen_role(model))
    return prepared


def actor_forward(wrapped: Any, actor: Any, args: Any, kwargs: Any) -> Any:
    """`Actor.forward`: note the dtype of the log-probs."""
    result = wrapped(*args, **kwargs)
    first = result[0] if isinstance(result, tuple) else result
    if isinstance(first, torch.Tensor):
        ledger().note(role_of(actor), "log_prob", first.dtype)
    return result


def optimizer_step(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> None:
    """`DeepspeedStrategy.optimizer_step`, called for every micro-batch: at the last of each update, watch the step."""
    engine = inner(argument(wrapped, args, kwargs, "model"))
    if not engine.is_gradient_accumulation_boundary():
        wrapped(*args, **kwargs)
        return
    _note_gradients(engine)
    outcome = _DeepSpeedStep(engine, lambda: wrapped(*args, **kwargs)).step()
    if not outcome.skipped:
        norms_of(engine).append(outcome.grad_norm)


def update_scale(wrapped: Any, scaler: Any, args: Any, kwargs: Any) -> None:
    """DeepSpeed's `DynamicLossScaler.update_scale`: a scale that grows does so after the step, not in it.

    DeepSpeed updates the scale first and unscales the gradients with the new one, so an update at which the scale
    doubles is taken with half its gradient.
    """
    before = scaler.cur_scale
    wrapped(*args, **kwargs)
    if current_plan().overrides_dtype and scaler.cur_scale > before:
        setattr(scaler, _GROWN, scaler.cur_scale)
        scaler.cur_scale = before


def gradients_of_a_micro_batch(wrapped: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
    """ZeRO 1 and 2's `get_all_grad_tensors`: micro-batches add up in the dtype DeepSpeed was told to accumulate in.

    DeepSpeed uses that dtype for the padding, and adds up in the parameters' own. Up to 0.17.5 it makes the list in
    `get_flat_partition`, which can also return it in one piece.
    """
    gradients = wrapped(*args, **kwargs)
    if not current_plan().overrides_dtype or not isinstance(gradients, list):
        return gradients
    return [gradient.to(optimizer.gradient_accumulation_dtype) for gradient in gradients]


def inner(model: Any) -> Any:
    """DeepSpeed's engine, or the bare model before there is one: OpenRLHF wraps a policy's in `Actor`."""
    return model.model if _is_actor(model) else model


def role_of(model: Any) -> str:
    """`actor`, `critic`, `ref`, `reward` or `ema`, as it was prepared."""
    return str(getattr(model, _ROLE, "actor"))


def norms_of(engine: Any) -> list[float]:
    """Gradient norms of the steps taken since the list was last emptied."""
    if not hasattr(engine, _NORMS):
        setattr(engine, _NORMS, [])
    return getattr(engine, _NORMS)  # type: ignore[no-any-return]


def _is_actor(model: Any) -> bool:
    from openrlhf.models import Actor

    return isinstance(model, Actor)


def _regression_role() -> str:
    # The same model with a value head is PPO's critic, and outside PPO the reward model that is being trained.
    return "critic" if preflight.inside_ray_actor() else "reward"


def _frozen_role(model: Any) -> str:
    if not _is_actor(model):
        return "reward"
    # PPO's policy worker keeps the moving average of its own weights; a reference has a worker of its own.
    averages = preflight.inside_ray_actor() and "actor" in ledger().roles
    return "ema" if averages else "ref"


def _watch(prepared: Any, role: str) -> None:
    engine = inner(prepared)
    for holder in (prepared, engine):
        setattr(holder, _ROLE, role)
    module = engine.module
    if current_plan().overrides_dtype:
        # ZeRO 3 builds a model in the parameters' dtype, buffers and all; DeepSpeed up to 0.19.1 rounds them always.
        rope.restore(module, "--ds.zero_stage", 3, "use 2")
    ledger().note(role, "parameter", *(parameter.dtype for parameter in module.parameters()))
    watch_compute(module, role)
    if not _is_actor(prepared):
        engine.register_forward_hook(_ValueWatch(role))


class _ValueWatch:
    """A forward hook that notes the dtype of a critic's values or a reward model's scores."""

    def __init__(self, role: str) -> None:
        self.role = role

    def __call__(self, engine: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor):
            ledger().note(self.role, "value", first.dtype)


def _note_gradients(engine: Any) -> None:
    role, optimizer = role_of(engine), engine.optimizer
    gradients = {gradient.dtype for _, gradient in _local_gradients(engine)}
    # Offloaded gradients are out of reach; this is what DeepSpeed was told to keep them in.
    ledger().note(role, "gradient", *(gradients or {engine.get_data_types()[1]}))
    masters = next((groups for name in _MASTERS if (groups := getattr(optimizer, name, None))), ())
    ledger().note(role, "master", *(master.dtype for master in masters))


def _local_gradients(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and this rank's reduced gradient of every parameter it has a share of; none when they are offloaded."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = getattr(optimizer, "params_in_partition", None) or getattr(optimizer, "fp16_groups", [])
    for index, gradients in getattr(optimizer, "averaged_gradients", {}).items():
        # A partition may end in padding that belongs to no parameter.
        for parameter, gradient in zip(groups[index], gradients or (), strict=False):
            if gradient is not None:
                yield names.get(id(parameter), f"group {index}"), gradient


class _DeepSpeedStep(WatchedEngine):
    def __init__(self, engine: Any, take: Callable[[], None]) -> None:
        super().__init__(engine, role_of(engine))
        self._take = take
        self._skipped_before = engine.skipped_steps
        self._counted = {name: getattr(engine, name) for name in _COUNTED if hasattr(engine, name)}
        self._at_floor = False

    def loss_scale(self) -> float | None:
        return float(self.engine.optimizer.loss_scale) if self.engine.fp16_enabled() else None

    def take(self) -> float:
        try:
            self._take()
        except Exception as failure:
            # DeepSpeed's own end of the run says neither which role, nor which step, nor which parameter.
            self._at_floor = current_plan().overrides_dtype and "already at minimum" in str(failure)
            if not self._at_floor:
                raise
        self._grow()
        norm = self.engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def _grow(self) -> None:
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if scaler is not None and hasattr(scaler, _GROWN):
            scaler.cur_scale = vars(scaler).pop(_GROWN)

    def was_skipped(self, scale_before: float | None, scale_after: float | None, grad_norm: float) -> bool:
        return self._at_floor or self.engine.skipped_steps > self._skipped_before

    def nonfinite(self) -> list[str]:
        return nonfinite_parameters(_local_gradients(self.engine))

    def set_loss_scale(self, scale: float) -> None:
        self.engine.optimizer.loss_scaler.cur_scale = scale

    def module(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module

    def uncount(self) -> None:
        for name, value in self._counted.items():
            setattr(self.engine, name, value)


def history_since(engine: Any, attempted: int, skipped: int, retries: int) -> dict[str, float]:
    """`fp16/*` of an engine's optimizer steps since these counts; `step_skipped` is the share of them skipped."""
    metrics, history = history_of(engine).metrics(), history_of(engine)
    steps = history.attempted - attempted
    since = {
        "fp16/step_skipped": (history.skipped_total - skipped) / steps if steps else 0.0,
        "fp16/retries": float(history.retries_total - retries),
    }
    return {**metrics, **{name: value for name, value in since.items() if name in metrics}}
