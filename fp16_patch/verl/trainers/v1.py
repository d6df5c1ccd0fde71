"""Hooks into verl's trainer (`PPOTrainer`): checks plan and processes, and records steps."""

from __future__ import annotations

from typing import Any

from fp16_patch.patching.call_arguments import argument
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import attestation, ledger
from fp16_patch.runtime.driver import log_caveats
from fp16_patch.runtime.preflight import inside_ray_actor
from fp16_patch.verl.config.caveats import caveats_of
from fp16_patch.verl.trainers.driver import VerlDriver, prepare


def validate_config(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`validate_config`, called by most programs before Ray: reconcile plan and configuration there.

    V0 checks again in its task runner, where our own check follows.
    """
    if not inside_ray_actor():
        _prepare_launch(argument(wrapped, args, kwargs, "config"))
    return wrapped(*args, **kwargs)


def run_ppo(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`run_ppo`, by which every program starts Ray: reconcile plan and configuration, if nothing has yet.

    What it hands to Ray is copied to each of several actors, and one of them starts the samplers.
    """
    if ledger().kind != "driver":
        _prepare_launch(argument(wrapped, args, kwargs, "config"))
    return wrapped(*args, **kwargs)


def _prepare_launch(config: Any) -> None:
    ledger().kind = "driver"
    prepare(config)
    log_caveats(caveats_of(config))
    propagation.carry_driver_record(attestation())


def init_dataloader(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._init_dataloader`, before any worker is started: reconcile plan and configuration, open the record.

    With `external_lib` alone, verl has imported us one call earlier, in this process only.
    """
    VerlDriver.of(trainer).begin()
    return wrapped(*args, **kwargs)


def update_actor(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._update_actor`: check every process before the update."""
    extra = argument(wrapped, args, kwargs, "batch").extra_info
    return VerlDriver.of(trainer).update_actor(wrapped, args, kwargs, extra)


def update_critic(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._update_critic`: do as for the actor; the critic is updated first."""
    return VerlDriver.of(trainer).update("critic", wrapped, args, kwargs)


def compute_old_log_prob(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._compute_old_log_prob`: order the ranks to observe, with this batch and in this pass only."""
    batch = argument(wrapped, args, kwargs, "batch")
    with VerlDriver.of(trainer).ordering(batch.extra_info):
        return wrapped(*args, **kwargs)


def calculate_debug_metrics(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`calculate_debug_metrics`, where verl has the tokens just scored: expect the ranks to have observed as many."""
    metrics: dict[str, Any] = wrapped(*args, **kwargs)
    driver = VerlDriver.running()
    if driver is not None:
        driver.expect_batch(argument(wrapped, args, kwargs, "data").batch)
    return metrics


def compute_metrics(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._compute_metrics`, the end of a step: add our metrics to verl's, and put the step on record."""
    result = wrapped(*args, **kwargs)
    VerlDriver.of(trainer).end_step(trainer.global_steps, argument(wrapped, args, kwargs, "metrics"))
    return result


def fit(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer.fit`: wait until what was recorded is on disk, before the job's processes end."""
    try:
        return wrapped(*args, **kwargs)
    finally:
        VerlDriver.of(trainer).flush()
