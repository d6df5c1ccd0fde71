"""verl's trainer (`PPOTrainer`): where in it the plan is checked, the processes are judged and steps are recorded."""

from __future__ import annotations

from typing import Any

from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import attestation, ledger
from fp16_patch.runtime.preflight import inside_ray_actor
from fp16_patch.verl.trainers import driver


def validate_config(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`validate_config`, the last thing the launching process does before it starts Ray: stop there if it must be.

    V0 checks again in its task runner, where our own check follows.
    """
    if inside_ray_actor():
        return wrapped(*args, **kwargs)
    ledger().kind = "driver"
    driver.prepare(kwargs.get("config", args[0] if args else None))
    propagation.carry_driver_record(attestation())
    return wrapped(*args, **kwargs)


def init_dataloader(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._init_dataloader`: the configuration has been read, no worker has been started.

    With `external_lib` alone, verl has imported us one call earlier, in this process only.
    """
    driver.begin(trainer, "task_runner")
    return wrapped(*args, **kwargs)


def update_actor(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._update_actor`: no update before every process is judged."""
    return driver.judged_update("actor", wrapped, trainer, args, kwargs)


def update_critic(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._update_critic`: as for the actor; the critic is updated first."""
    return driver.judged_update("critic", wrapped, trainer, args, kwargs)


def compute_old_log_prob(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._compute_old_log_prob`: the ranks are told to observe, with this batch and in this pass only."""
    batch = kwargs["batch"] if "batch" in kwargs else args[0]
    with driver.observed(batch.extra_info):
        return wrapped(*args, **kwargs)


def calculate_debug_metrics(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """`calculate_debug_metrics`, where verl has the tokens just scored: how many the ranks must have observed."""
    metrics: dict[str, Any] = wrapped(*args, **kwargs)
    driver.expect(kwargs.get("data", args[0] if args else None).batch)
    return metrics


def compute_metrics(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer._compute_metrics`, the end of a step: our metrics join verl's, and the step goes on record."""
    result = wrapped(*args, **kwargs)
    driver.end_step(trainer.global_steps, kwargs["metrics"] if "metrics" in kwargs else args[1])
    return result


def fit(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`PPOTrainer.fit`: what was recorded reaches the disk before the job's processes end."""
    try:
        return wrapped(*args, **kwargs)
    finally:
        driver.flush()
