"""One mini-batch of a verl engine, FSDP's or Megatron's: computed until its step is taken, and what became of it."""

from __future__ import annotations

from typing import Any

from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime.preflight import require_other_ranks
from fp16_patch.scaling.optimizer_step import step_of
from fp16_patch.scaling.random_state import RandomState
from fp16_patch.scaling.step_report import report_taken_norms
from fp16_patch.verl.fsdp import update as fsdp
from fp16_patch.verl.fsdp.device import device_type
from fp16_patch.verl.fsdp.engine import role_of
from fp16_patch.verl.fsdp.step_metrics import reducible
from fp16_patch.verl.megatron import update as megatron
from fp16_patch.verl.megatron.update_state import UpdateState
from fp16_patch.verl.trainers import lags
from fp16_patch.verl.trainers.observation import observe, order_for_update


def train_batch(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """`BaseEngine.train_batch`: try again on an overflow; add the outcome to the metrics, and no skipped norm.

    Where nothing scores samples but the update itself, compare its log-probs with the sampler's.
    """
    require_other_ranks()
    data = argument(wrapped, args, kwargs, "data")
    order = order_for_update(engine, data)
    lag_of_label = {} if order is None else lags.now(order.ahead, order.restored)

    def compute() -> Any:
        return wrapped(*args, **kwargs)

    if fsdp.is_repeatable(engine):
        outputs = fsdp.FSDPUpdate.of(engine).run_mini_batch(compute, RandomState(device_type()))
    elif megatron.is_repeatable(engine):
        state = UpdateState(device_type(), engine.module)
        outputs = megatron.MegatronUpdate.of_engine(engine).run_mini_batch(compute, state)
    else:
        outputs = compute()
    step = step_of(engine)
    if role_of(engine) == "actor" and (step is None or step.history.last is None or not step.history.last.skipped):
        lags.versions.updated()
    if order is not None:
        observe(engine, order, data, outputs, lag_of_label)
    # Other engines record no steps.
    if step is not None and step.history.last is not None and engine.is_mp_src_rank_with_outputs():
        # Lists: the worker chains them over ranks and mini-batches.
        outputs["metrics"].update({name: [value] for name, value in reducible(step.metrics()).items()})
        if step.history.last.skipped:
            report_taken_norms(outputs["metrics"], "grad_norm", [step.history.last])
    return outputs
