"""The FSDP engine: its gradient scaler, what becomes of each optimizer step, and the dtypes it computes in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from fp16_patch.runtime import rope
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.runtime.compute_dtypes import watch_compute
from fp16_patch.scaling import first_scale, gradient_stats, retry, scale_growth
from fp16_patch.scaling.optimizer_step import WatchedEngine, history_of, start_anew
from fp16_patch.scaling.retry import RandomState, until_taken
from fp16_patch.scaling.scaler import StepHistory, nonfinite_parameters, sharded_scaler
from fp16_patch.verl.fsdp import fused_step
from fp16_patch.verl.fsdp.device import device_type


def role_of(engine: Any) -> str:
    """`actor`, `critic` or `ref`, from what the engine was built for."""
    if engine.model_config.model_type == "value_model":
        return "critic"
    return "ref" if engine.engine_config.forward_only else "actor"


def scaler_of(engine: Any) -> Any:
    """The engine's gradient scaler or None; subclasses that build their module another way never set one."""
    return getattr(engine, "scaler", None)


def build_module(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> nn.Module:
    """`FSDPEngine._build_module`: a model stored in half keeps its RoPE frequencies in FP32."""
    module: nn.Module = wrapped(*args, **kwargs)
    if current_plan().overrides_dtype:
        rope.restore(module, f"{role_of(engine)}.fsdp_config.model_dtype", engine.engine_config.model_dtype, "use fp32")
    return module


def build_fsdp_module(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> nn.Module:
    """`FSDPEngine._build_fsdp_module`: a scaler that works on this device and has the plan's settings."""
    plan = current_plan()
    module: nn.Module = wrapped(*args, **kwargs)
    start_anew(engine)
    scale_growth.forget(engine)
    if plan.overrides_dtype:
        trains = plan.scales_loss and not engine.engine_config.forward_only
        engine.scaler = sharded_scaler(plan, device_type()) if trains else None
    ledger().rank = engine.rank
    watch_compute(module, role_of(engine))
    return module


def gradient_sync_context(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`FSDPEngine._gradient_sync_context`: under FSDP1's no_sync micro-batches add up in the compute dtype, scaled."""
    if current_plan().overrides_dtype and engine.engine_config.strategy == "fsdp":
        return nullcontext()
    return wrapped(*args, **kwargs)


def optimizer_step(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> float:
    """`FSDPEngine.optimizer_step`: no step before the driver allows it, its outcome recorded, collapse raised."""
    if first_scale.measuring(engine):
        return 0.0
    note_gradients(engine.module, role_of(engine))
    folds = fused_step.possible(engine)
    outcome = _FSDPStep(engine, lambda: fused_step.take(engine) if folds else wrapped(*args, **kwargs)).step()
    if outcome.skipped and current_plan().overrides_dtype:
        hold_floor(engine.scaler)
    return outcome.grad_norm


def lr_scheduler_step(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> float:
    """`FSDPEngine.lr_scheduler_step`: the schedule counts updates, so it waits for one that was taken."""
    history = history_of(engine)
    history.retries_since_lr = 0
    if current_plan().overrides_dtype and history.attempted and not history.taken_since_lr:
        return engine.lr_scheduler.get_last_lr()[0]  # type: ignore[no-any-return]
    history.taken_since_lr = False
    return wrapped(*args, **kwargs)  # type: ignore[no-any-return]


def train_batch(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`BaseEngine.train_batch`: tried again on an overflow; its outcome joins the metrics, a skipped norm does not."""
    outputs = _taken(engine, lambda: wrapped(*args, **kwargs))
    history = history_of(engine)
    if history.last is None or not engine.is_mp_src_rank_with_outputs():
        return outputs
    # Lists: the worker chains them over ranks and mini-batches.
    seen = {**reducible_metrics(history), **gradient_stats.metrics_of(engine)}
    outputs["metrics"].update({name: [value] for name, value in seen.items()})
    if history.last.skipped and current_plan().overrides_dtype:
        outputs["metrics"].pop("grad_norm", None)
    return outputs


def _taken(engine: Any, compute: Callable[[], Any]) -> Any:
    if not _can_repeat(engine):
        return compute()
    random = RandomState(device_type())
    if current_plan().first_scale == "measured" and not history_of(engine).attempted:
        first_scale.measure(_FSDPStep(engine, _no_step), random, compute, _loss_is_finite)
        engine.optimizer_zero_grad()
    step, scaler = _FSDPStep(engine, _no_step), scaler_of(engine)
    scale_growth.hold_back(step, scaler)
    if not scale_growth.wants_look(step, scaler):
        gradient_stats.forget(engine)
        return _repeated(engine, random, compute)
    looks = gradient_stats.Looking(step)
    outputs = _repeated(engine, random, looks.through(compute))
    scale_growth.learn(step, looks.figures())
    return outputs


def _repeated(engine: Any, random: RandomState, compute: Callable[[], Any]) -> Any:
    if not retry.wanted():
        return compute()

    def attempt(again: bool) -> Any:
        if again:
            random.restore()
        return compute()

    return until_taken(engine, attempt, _loss_is_finite)


def _loss_is_finite(outputs: Any) -> bool:
    return all(map(math.isfinite, outputs["loss"]))


def _no_step() -> float:
    raise RuntimeError("no step is taken while gradients are only looked at")


def _can_repeat(engine: Any) -> bool:
    """Whether all that an update does is in `train_batch`, and its scaler is the one made here."""
    if not current_plan().scales_loss or scale_of(scaler_of(engine)) is None:
        return False
    return engine.engine_config.strategy in ("fsdp", "fsdp2")


def reducible_metrics(history: StepHistory) -> dict[str, float]:
    """The outcome of the last step under names that verl reduces in the right way."""
    # verl reduces over mini-batches by name: a mean, unless the name says min or max.
    largest = ("skipped_total", "consecutive_skips", "retries", "retries_total")
    reduction = {"fp16/loss_scale": "/min", **{f"fp16/{name}": "/max" for name in largest}}
    return {name + reduction.get(name, ""): value for name, value in history.metrics().items()}


def scale_of(scaler: Any) -> float | None:
    """The loss scale in force; None without a scaler, or with one that torch has disabled."""
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None


class _FSDPStep(WatchedEngine):
    def __init__(self, engine: Any, take: Callable[[], float]) -> None:
        super().__init__(engine, role_of(engine))
        self._take = take

    def loss_scale(self) -> float | None:
        return scale_of(scaler_of(self.engine))

    def take(self) -> float:
        return self._take()

    def was_skipped(self, scale_before: float | None, scale_after: float | None, grad_norm: float) -> bool:
        if scaler_of(self.engine) is None:
            return not math.isfinite(grad_norm)  # what verl looks at then
        # torch lowers the scale after an overflow and never otherwise; a scaler it has disabled skips nothing.
        return scale_before is not None and scale_after is not None and scale_after < scale_before

    def nonfinite(self) -> list[str]:
        return nonfinite_parameters(local_gradients(self.engine.module))

    def set_loss_scale(self, scale: float) -> None:
        set_scale(scaler_of(self.engine), scale)

    def module(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module


def set_scale(scaler: Any, scale: float) -> None:
    """Go on at this scale, also before the scaler has scaled anything."""
    scaler.load_state_dict({**scaler.state_dict(), "scale": float(scale)})


def hold_floor(scaler: Any) -> None:
    """Raise the scale to the plan's floor if an overflow has taken it below."""
    plan = current_plan()
    scale = scale_of(scaler)
    if scale is not None and scale < plan.min_scale:
        scaler.update(float(plan.min_scale))


def note_gradients(module: nn.Module, role: str) -> None:
    """Note the dtypes of gradients and of the parameters they are for, before a step."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    ledger().note(role, "gradient", *(parameter.grad.dtype for parameter in parameters))
    ledger().note(role, "master", *(parameter.dtype for parameter in parameters))


def local_gradients(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and local shard of every gradient, FSDP1's flat parameters taken apart into what they hold."""
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        name = name.replace("_fsdp_wrapped_module.", "")
        gradient = parameter.grad
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        if hasattr(parameter, "_fqns"):
            yield from _flat_gradients(name, parameter, local)
        else:
            yield name, local


def _flat_gradients(name: str, flat: Any, gradient: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    prefix = name.removesuffix("_flat_param")
    shards = getattr(flat, "_shard_param_infos", None)
    if shards is None:
        yield f"{prefix}{'|'.join(flat._fqns)}", gradient
        return
    for fqn, shard in zip(flat._fqns, shards, strict=True):
        if shard.in_shard:
            start = shard.offset_in_shard
            yield prefix + fqn, gradient.flatten()[start : start + shard.numel_in_shard]
