"""DeepSpeed as OpenRLHF sets it up: its configuration, and its engines' dtypes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fp16_patch.openrlhf.config import arguments
from fp16_patch.openrlhf.deepspeed.engines import inner, is_actor
from fp16_patch.openrlhf.deepspeed.step import DeepSpeedStep
from fp16_patch.patching.call_arguments import argument, bound, takes
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime import preflight, propagation, rope
from fp16_patch.runtime.activation import attestation, current_plan, ledger, our_part
from fp16_patch.runtime.carried_plan import CarriedPlan
from fp16_patch.runtime.compute_dtypes import watch_compute
from fp16_patch.scaling.optimizer_step import step_of

logger = logging.getLogger(__name__)

_NOTING_VALUES = our_part("what notes the dtype of a model's values")

REDUCE_BUCKET = 200_000_000
"""Gradients that are reduced at once. DeepSpeed's 5e8 are meant for 2 bytes each.

A bucket is there in 16 bits, and for the reduction in FP32: once under ZeRO 2, twice under ZeRO 3. This many take
1.2 and 2.0 GB, as 5e8 without an FP32 copy take 1.0 and 2.0.
"""


def init(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> None:
    """`DeepspeedStrategy.__init__`: check the command line against the plan, which goes where the strategy is sent."""
    run = argument(wrapped, args, kwargs, "args")
    plan = current_plan()
    arguments.check(run, plan)
    changed = arguments.apply_to(run, plan) if plan.overrides_dtype else []
    if plan.overrides_dtype and os.environ.get("RANK", "0") == "0":
        _say_what_changes(plan, changed)
        for slow in arguments.slow_paths_of(run, plan):
            logger.warning("%s", slow)
    call = bound(wrapped, args, kwargs)
    if changed and takes(wrapped, "bf16"):
        # Up to 0.9.1 it is given beside the arguments, which say it, too.
        call.arguments["bf16"] = run.bf16
    wrapped(*call.args, **call.kwargs)
    strategy.fp16_patch = CarriedPlan(plan)
    ledger().kind = "driver"
    propagation.carry_driver_record(attestation())


def _say_what_changes(plan: Plan, changed: Sequence[str]) -> None:
    if changed:
        flags = "\n  ".join(changed)
        logger.warning("every role computes in %s; the command line said otherwise:\n  %s", plan.dtype, flags)
    logger.info(
        "gradients are reduced in FP32, so in buckets of %.0e elements; DeepSpeed's of 5e8 would take 2 GB more under "
        "ZeRO 2, 3 GB under ZeRO 3",
        REDUCE_BUCKET,
    )


def setup_distributed(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> Any:
    """`DeepspeedStrategy.setup_distributed`: note that this process is a learner's rank."""
    result = wrapped(*args, **kwargs)
    ledger().kind, ledger().rank = "worker", torch.distributed.get_rank()
    return result


def train_config(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`DeepspeedStrategy.get_ds_train_config`: set the plan's dtype and scaler, and reduce gradients in FP32.

    OpenRLHF writes `{"enabled": true}` and leaves the rest to DeepSpeed's defaults, which differ between releases.
    """
    config: dict[str, Any] = wrapped(*args, **kwargs)
    plan = current_plan()
    if plan.overrides_dtype:
        config["communication_data_type"] = "fp32"
        _bound_bucket(config["zero_optimization"])
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


def _bound_bucket(zero: dict[str, Any]) -> None:
    """Bound what FP32 gradients take while they are reduced, where nobody has chosen a size."""
    if zero.get("reduce_bucket_size", "auto") == "auto":
        zero["reduce_bucket_size"] = REDUCE_BUCKET


def eval_config(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`DeepspeedStrategy.get_ds_eval_config` up to 0.9.1, which knows bf16 or nothing: set the plan's dtype."""
    config: dict[str, Any] = wrapped(*args, **kwargs)
    if current_plan().overrides_dtype:
        _say_dtype(config)
    return config


def _say_dtype(config: dict[str, Any]) -> None:
    plan = current_plan()
    config["bf16"], config["fp16"] = {"enabled": plan.dtype == "bfloat16"}, {"enabled": plan.dtype == "float16"}


def init_train_model(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> Any:
    """`DeepspeedStrategy._ds_init_train_model`: put RoPE back to FP32, and note what the engine computes in."""
    model = argument(wrapped, args, kwargs, "model")
    role = "actor" if is_actor(model) else _regression_role()
    prepared = wrapped(*args, **kwargs)
    _watch(prepared[0], role)
    return prepared


def init_eval_model(wrapped: Any, strategy: Any, args: Any, kwargs: Any) -> Any:
    """`DeepspeedStrategy._ds_init_eval_model`: do as for models that train."""
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


def gradients_of_a_micro_batch(wrapped: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
    """ZeRO 1 and 2's `get_all_grad_tensors`: add micro-batches up in the dtype DeepSpeed was told to accumulate in.

    DeepSpeed uses that dtype for the padding, and adds up in the parameters' own. Up to 0.17.5 it makes the list in
    `get_flat_partition`, which can also return it in one piece.
    """
    gradients = wrapped(*args, **kwargs)
    if not current_plan().overrides_dtype or not isinstance(gradients, list):
        return gradients
    return [gradient.to(optimizer.gradient_accumulation_dtype) for gradient in gradients]


def role_of(model: Any) -> str:
    """Return `actor`, `critic`, `ref`, `reward` or `ema`, as it was prepared."""
    step = step_of(model)
    return "actor" if step is None else step.role


def _regression_role() -> str:
    # The same model with a value head is PPO's critic, and outside PPO the reward model that is being trained.
    return "critic" if preflight.inside_ray_actor() else "reward"


def _frozen_role(model: Any) -> str:
    if not is_actor(model):
        return "reward"
    # PPO's policy worker keeps the moving average of its own weights; a reference has a worker of its own.
    averages = preflight.inside_ray_actor() and "actor" in ledger().roles
    return "ema" if averages else "ref"


def _watch(prepared: Any, role: str) -> None:
    engine = inner(prepared)
    step = DeepSpeedStep(engine, role)
    for holder in (prepared, engine):
        step.share_with(holder)
    module = engine.module
    if current_plan().overrides_dtype:
        # ZeRO 3 builds a model in the parameters' dtype, buffers and all; DeepSpeed up to 0.19.1 rounds them always.
        rope.restore(module, "--ds.zero_stage", 3, "use 2")
    ledger().note(role, "parameter", *(parameter.dtype for parameter in module.parameters()))
    watch_compute(module, role)
    if not is_actor(prepared):
        engine.register_forward_hook(_ValueWatch(role))


class _ValueWatch:
    """A forward hook that notes the dtype of a critic's values or a reward model's scores."""

    def __init__(self, role: str) -> None:
        self.role = role

    def __call__(self, engine: nn.Module, inputs: Any, output: Any) -> None:
        _NOTING_VALUES.run(lambda: self._note(output))

    def _note(self, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor):
            ledger().note(self.role, "value", first.dtype)
