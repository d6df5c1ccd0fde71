"""Megatron under the plan: the dtype its models are built for, FP32 reductions, and the settings of its loss scaler.

Nothing of Megatron is imported before verl has imported it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch

from fp16_patch.patching.call_arguments import argument, bound
from fp16_patch.plan.dtypes import BFLOAT16
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.activation import current_plan, ledger
from fp16_patch.runtime.compute_dtypes import watch_linear
from fp16_patch.verl.config.settings import force
from fp16_patch.verl.megatron.scaler import fit_loads

NO_BRIDGE = "without a bridge Megatron's models are built for bfloat16 only"
_ROUTER_DTYPES = ("fp32", "fp64")
_MERGER = "verl.model_merger.megatron_model_merger"
_WATCHED = "_fp16_patch_watched"
_CHECK_FOR_LARGE = {"check_for_large_grads"}
_BF16_BRIDGE = "DeepseekV3Bridge"
_ATTENTION, _BF16_ATTENTION = "experimental_attention_variant", "dsa"


def role_of(engine: Any) -> str:
    """Return `actor`, `critic` or `ref`: what a Megatron engine was built for."""
    if getattr(engine, "is_value_model", False):
        return "critic"
    return "ref" if engine.engine_config.forward_only else "actor"


def init_configs(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronWorker._init_hf_config_and_tf_config`: configure all roles' models for the plan's dtype.

    The ref takes the actor's dtype otherwise, and before 0.6.1 all of them bfloat16.
    """
    plan = current_plan()
    if not plan.overrides_dtype:
        return wrapped(*args, **kwargs)
    worker.param_dtype = worker.dtype = plan.torch_dtype
    call = bound(wrapped, args, kwargs)
    call.arguments["dtype"] = plan.torch_dtype
    result = wrapped(*call.args, **call.kwargs)
    _fit(worker, plan)
    return result


def build_tf_config(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronEngine._build_tf_config`: build actor, ref and critic for the plan's dtype, whatever their keys say."""
    plan = current_plan()
    if not plan.overrides_dtype:
        return wrapped(*args, **kwargs)
    force(engine.engine_config, dtype=plan.dtype)
    result = wrapped(*args, **kwargs)
    engine.param_dtype = engine.dtype = plan.torch_dtype
    _fit(engine, plan)
    return result


def make_module(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`make_megatron_module`: add up and reduce gradients in FP32, leave overflows to the loss scaler, note dtypes."""
    call = bound(wrapped, args, kwargs)
    wrap = call.arguments["wrap_config"]
    if current_plan().overrides_dtype and wrap.wrap_with_ddp:
        override = call.arguments.get("override_ddp_config") or {}
        call.arguments["override_ddp_config"] = {**override, **_ddp_settings(current_plan(), override)}
    result = wrapped(*call.args, **call.kwargs)
    watch_chunks(result[0] if isinstance(result, tuple) else result, _role(wrap.is_value_model, wrap.wrap_with_ddp))
    return result


def optimizer_config(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`init_megatron_optim_config`: set the plan's dtype and loss scale, and FP32 for all that an optimizer keeps."""
    config, plan = wrapped(*args, **kwargs), current_plan()
    if plan.overrides_dtype:
        for name, value in {**_optimizer_dtypes(plan), **(_loss_scale(plan) if plan.scales_loss else {})}.items():
            setattr(config, name, value)
    return config


def make_optimizer(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`get_megatron_optimizer`: give its scalers the plan's factors, and multiply losses by their scale.

    Before 0.6.1 nothing multiplies: gradients would only be divided.
    """
    optimizer, plan = wrapped(*args, **kwargs), current_plan()
    if plan.overrides_dtype and plan.scales_loss:
        _fit_scalers(optimizer, plan)
        for chunk in argument(wrapped, args, kwargs, "model"):
            _config_of(chunk).grad_scale_func = optimizer.scale_loss
    return optimizer


def load_shards(wrapped: Any, merger: Any, args: Any, kwargs: Any) -> Any:
    """`MegatronModelMerger._load_state_dicts`: load shards into a model of the plan's dtype, not of bfloat16."""
    plan = current_plan()
    if not plan.overrides_dtype:
        return wrapped(*args, **kwargs)
    module: Any = import_module(_MERGER)
    to_config = module.hf_to_mcore_config
    module.hf_to_mcore_config = partial(_merger_config, to_config, plan)
    try:
        return wrapped(*args, **kwargs)
    finally:
        module.hf_to_mcore_config = to_config


def parts_of(optimizer: Any) -> list[Any]:
    """Return the optimizers behind a chained one (dense and expert parameters have one each), or the one itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def scalers_of(optimizer: Any) -> list[Any]:
    """Return its loss scalers, one a part; the first is the one that losses are multiplied by."""
    scalers = [getattr(part, "grad_scaler", None) for part in parts_of(optimizer)]
    return [scaler for scaler in scalers if scaler is not None]


def watch_chunks(chunks: Iterable[Any], role: str) -> None:
    """Note for `role` what the first linear layer of each stack of blocks computes in, at each forward.

    The last call says the role: a bridge that builds an actor for Muon's layer-wise optimizer is told of no DDP.
    """
    if torch.distributed.is_initialized():
        ledger().rank = torch.distributed.get_rank()
    for chunk in chunks:
        for linear in _first_linears(chunk):
            if hasattr(linear, _WATCHED):
                getattr(linear, _WATCHED).role = role
            else:
                setattr(linear, _WATCHED, watch_linear(linear, role))


def _ddp_settings(plan: Plan, override: dict[str, Any]) -> dict[str, Any]:
    """Return what has to hold of Megatron's DDP whatever is asked of it.

    Its checks end the run at a non-finite gradient, or a large one, before the loss scaler sees it. The second is a
    field of newer releases only, so it is taken back where it is asked for.
    """
    checks = {"check_for_nan_in_grad", *(_CHECK_FOR_LARGE & override.keys())} if plan.scales_loss else set()
    return {"grad_reduce_in_fp32": True, **dict.fromkeys(checks, False)}


def _fit(owner: Any, plan: Plan) -> None:
    """Make what was built for one dtype fit for the plan's: verl sets only some of it, and not in each release."""
    if conflicts := list(_bridge_conflicts(owner.bridge, owner.tf_config, plan)):
        raise PlanError(conflicts)
    provider = getattr(owner, "provider", None)
    for config in (owner.tf_config, provider):
        if config is not None:
            _fit_config(config, plan)
    if provider is None:
        owner.bridge.dtype = plan.torch_dtype
        owner.bridge.get_model = partial(_get_model, owner.bridge.get_model, plan)


def _bridge_conflicts(bridge: Any, config: Any, plan: Plan) -> Iterator[Conflict]:
    """Yield what a bridge, or Megatron for the model that it builds, can have in bfloat16 only."""
    if bridge is None:
        yield Conflict("megatron.use_mbridge", False, NO_BRIDGE, "set it to true for every role")
    if plan.dtype == BFLOAT16.torch:
        return
    if _BF16_BRIDGE in {each.__name__ for each in type(bridge).__mro__}:
        reason = "mbridge loads models of DeepSeek-V3's architecture in bfloat16 only"
        yield Conflict("megatron.vanilla_mbridge", True, reason, "set it to false: Megatron-Bridge loads them")
    if (attention := getattr(config, _ATTENTION, None)) == _BF16_ATTENTION:
        reason = "Megatron computes DeepSeek's sparse attention in bfloat16 only"
        yield Conflict(f"the model's {_ATTENTION}", attention, reason, "use another model, or FP16_PATCH=bf16")


def _fit_config(config: Any, plan: Plan) -> None:
    config.params_dtype = config.pipeline_dtype = config.autocast_dtype = plan.torch_dtype
    config.fp16, config.bf16 = (plan.dtype == dtype for dtype in ("float16", "bfloat16"))
    # Megatron's router has the dtype of its input otherwise: few bridges say so, and experts are chosen by rounding.
    if getattr(config, "num_moe_experts", None) and config.moe_router_dtype not in _ROUTER_DTYPES:
        config.moe_router_dtype = "fp32"


def _merger_config(to_config: Any, plan: Plan, hf_config: Any, dtype: torch.dtype, **kwargs: Any) -> Any:
    config = to_config(hf_config, plan.torch_dtype, **kwargs)
    _fit_config(config, plan)
    return config


def _get_model(get_model: Any, plan: Plan, **kwargs: Any) -> Any:
    precision = {"fp16": plan.dtype == "float16", "bf16": plan.dtype == "bfloat16"}
    chunks = get_model(**{**kwargs, **precision})
    made = [callback.__name__ for callback in kwargs.get("post_model_creation_callbacks", ())]
    watch_chunks(chunks, _role("make_value_model" in made, kwargs.get("wrap_with_ddp", False)))
    return chunks


def _role(is_value_model: bool, trains: bool) -> str:
    if is_value_model:
        return "critic" if trains else "reward"
    return "actor" if trains else "ref"


def _optimizer_dtypes(plan: Plan) -> dict[str, Any]:
    kept = ("main_params_dtype", "main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    return {
        "params_dtype": plan.torch_dtype,
        "fp16": plan.dtype == "float16",
        "bf16": plan.dtype == "bfloat16",
        **dict.fromkeys(kept, torch.float32),
    }


def _loss_scale(plan: Plan) -> dict[str, Any]:
    return {
        "loss_scale": None,  # one that is given stays as it is for ever, overflow or not
        "initial_loss_scale": plan.init_scale,
        "min_loss_scale": plan.min_scale,
        "loss_scale_window": plan.growth_interval,
        "hysteresis": plan.hysteresis,
    }


def _fit_scalers(optimizer: Any, plan: Plan) -> None:
    scalers = scalers_of(optimizer)
    if parts_of(optimizer) and not scalers:
        raise RuntimeError(
            "Megatron built an optimizer without a loss scaler, and FP16 training needs one. Fix: use an optimizer "
            "that Megatron runs in mixed precision, or FP16_PATCH=bf16"
        )
    for scaler in scalers:
        scaler.growth_factor.fill_(plan.growth_factor)
        scaler.backoff_factor.fill_(plan.backoff_factor)
        fit_loads(scaler, plan.growth_interval)


def _config_of(chunk: Any) -> Any:
    return import_module("megatron.core.utils").get_model_config(chunk)


def _first_linears(chunk: Any) -> Iterator[Any]:
    # Megatron's and TransformerEngine's linear layers are no torch.nn.Linear. The head is outside the blocks.
    seen = set()
    for name, module in chunk.named_modules():
        stack, blocks, _ = name.partition("layers.")
        weight = getattr(module, "weight", None)
        if blocks and stack not in seen and "Linear" in type(module).__name__ and getattr(weight, "ndim", 0) == 2:
            seen.add(stack)
            yield module
