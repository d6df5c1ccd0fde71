"""Hooks into verl's trainers with samplers on devices of their own: `fully_async_policy` and `one_step_off_policy`.

They share a base, `SeparateRayPPOTrainer`, and with the V0 trainer what updates and scores: `v0` has hooks for that.
"""

from __future__ import annotations

from typing import Any

from fp16_patch.verl.trainers.v0_drivers import VerlSeparateDriver


def init_resource_pools(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`SeparateRayPPOTrainer._init_resource_pools`, before any worker: reconcile plan and configuration.

    Where the trainer has a data loader, this has happened before it was made.
    """
    driver = VerlSeparateDriver.of(trainer)
    if driver.monitor is None:
        driver.begin()
    return wrapped(*args, **kwargs)


def collect_metrics(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`SeparateRayPPOTrainer._fit_collect_metrics`, the end of a step: add our metrics, put the step on record.

    What ends the trainer's loop is an exception, and the job's processes end without notice: each step is written out.
    """
    result = wrapped(*args, **kwargs)
    driver = VerlSeparateDriver.of(trainer)
    driver.end_step(trainer.global_steps, trainer.metrics)
    driver.flush()
    return result
