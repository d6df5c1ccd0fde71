"""VeOmni's engine, which is verl's FSDP engine but for its build, its backward pass and its step.

It has VeOmni shard the module, by FSDP2 and in bfloat16, and never asks for a scaler. Updates, log-probs and the
schedule are those of the FSDP engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from torch.optim import Optimizer

from fp16_patch.patching.call_arguments import argument
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.activation import current_plan
from fp16_patch.scaling.norm_first import float_of, skip_unless_finite
from fp16_patch.verl.config.settings import force, mixed_precision
from fp16_patch.verl.config.supported_engines import VEOMNI_ENGINE
from fp16_patch.verl.fsdp.engine import take_over
from fp16_patch.verl.fsdp.update import FSDPUpdate, scales_loss


def build_model_optimizer(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`VeOmniEngine._build_model_optimizer`: compute in the plan's dtype with FP32 masters, and have a scaler."""
    plan = current_plan()
    if plan.overrides_dtype:
        # Without it VeOmni stores all parameters in bfloat16.
        force(engine.engine_config, mixed_precision=True)
        # What the forward pass, the FSDP engine's, looks for.
        engine._autocast_dtype = plan.torch_dtype
        with _mixed_precision_of(plan):
            result = wrapped(*args, **kwargs)
    else:
        result = wrapped(*args, **kwargs)
    take_over(engine, engine.module)
    return result


def forward_backward_batch(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`VeOmniEngine.forward_backward_batch`: multiply each loss by the loss scale before its backward pass."""
    if not scales_loss(engine) or argument(wrapped, args, kwargs, "forward_only"):
        return wrapped(*args, **kwargs)
    with _scaled_losses(engine):
        return wrapped(*args, **kwargs)


def optimizer_step(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> float:
    """`VeOmniEngine.optimizer_step`: as the FSDP engine's, with gradients that are unscaled before they are clipped."""
    update = FSDPUpdate.of(engine)
    if update.measuring:
        return 0.0
    stock = partial(wrapped, *args, **kwargs)
    scaled = scales_loss(engine)
    outcome, _ = update.run(lambda: _take(engine.scaler, optimizers_of(engine), stock) if scaled else stock())
    return outcome.grad_norm


def optimizers_of(engine: Any) -> list[Optimizer]:
    """Return its optimizers: VeOmni has one for each way of sharding, in one that knows no parameters itself."""
    together = getattr(engine.optimizer, "optimizers_dict", None)
    return [engine.optimizer] if together is None else list(together.values())


def _take(scaler: Any, optimizers: list[Optimizer], step: Callable[[], float]) -> float:
    """Unscale, let verl clip and step, which it does if the norm is finite, and adapt the scale to what it did."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = step()
    skip_unless_finite(scaler, optimizers, float_of(norm))
    scaler.update()
    return norm


@contextmanager
def _mixed_precision_of(plan: Plan) -> Iterator[None]:
    # verl names no dtype when it makes VeOmni's settings: they would be bfloat16's.
    dtypes = mixed_precision(plan)
    module: Any = import_module(VEOMNI_ENGINE)
    settings = module.MixedPrecisionConfig
    module.MixedPrecisionConfig = partial(settings, **{name: dtypes[name] for name in ("param_dtype", "reduce_dtype")})
    try:
        yield
    finally:
        module.MixedPrecisionConfig = settings


@contextmanager
def _scaled_losses(engine: Any) -> Iterator[None]:
    forward_step, of_its_own = engine.forward_step, "forward_step" in vars(engine)

    def scaled(*args: Any, **kwargs: Any) -> Any:
        loss, output = forward_step(*args, **kwargs)
        return engine.scaler.scale(loss), output

    engine.forward_step = scaled
    try:
        yield
    finally:
        if of_its_own:
            engine.forward_step = forward_step
        else:
            del engine.forward_step
