"""Hooks into verl's V0 trainer (`RayPPOTrainer`): the same as in `v1`, where this trainer has the place for it."""

from __future__ import annotations

from typing import Any

import wrapt

from fp16_patch.patching.call_arguments import argument
from fp16_patch.patching.guarded_hook import Hook, guarded
from fp16_patch.plan.errors import Conflict, PlanError
from fp16_patch.runtime.activation import current_plan, ledger, our_part
from fp16_patch.verl.trainers.driver import prepare
from fp16_patch.verl.trainers.v0_drivers import VerlV0Driver, driver_of, is_rollouter


def create_dataloader(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer._create_dataloader`, before workers start: reconcile plan and configuration, open the record."""
    if is_rollouter(trainer):
        # It starts the samplers by a copy of the configuration of its own; another actor trains, and judges.
        ledger().kind = "rollouter"
        prepare(trainer.config)
    else:
        driver_of(trainer).begin()
    return wrapped(*args, **kwargs)


def update_actor(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer._update_actor`: check every process before the update."""
    extra = argument(wrapped, args, kwargs, "batch").meta_info
    return driver_of(trainer).update_actor(wrapped, args, kwargs, extra)


def update_critic(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer._update_critic`: do as for the actor; the critic is updated first."""
    return driver_of(trainer).update("critic", wrapped, args, kwargs)


def compute_old_log_prob(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer._compute_old_log_prob`: order the ranks to observe, with this batch and in this pass only."""
    batch = argument(wrapped, args, kwargs, "batch")
    with driver_of(trainer).ordering(batch.meta_info):
        return wrapped(*args, **kwargs)


def actor_workers(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer.init_workers`, where `fit` calls the workers itself: check every process before it does."""
    result = wrapped(*args, **kwargs)
    _check_before(trainer, trainer.actor_rollout_wg, "update_actor", "actor")
    return result


def critic_workers(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer.init_workers`: do as `actor_workers`, for the critic's."""
    result = wrapped(*args, **kwargs)
    if trainer.use_critic:
        _check_before(trainer, trainer.critic_wg, "update_critic", "critic")
    return result


def observing_workers(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer.init_workers`, where `fit` has the actor's workers score samples itself: order them to observe."""
    result = wrapped(*args, **kwargs)
    _observe_in(trainer, trainer.actor_rollout_wg, "compute_log_prob")
    return result


def fit(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    """`RayPPOTrainer.fit`: wait until what was recorded is on disk, before the job's processes end.

    With `external_lib` alone, older releases import us after the trainer has started its workers.

    Raises:
        PlanError: so it was, and the configuration was never checked.
    """
    driver = driver_of(trainer)
    if driver.monitor is None and current_plan().overrides_dtype:
        raise PlanError([too_late(trainer.config)])
    try:
        return wrapped(*args, **kwargs)
    finally:
        driver.flush()


def log(wrapped: Any, tracking: Any, args: Any, kwargs: Any) -> Any:
    """`Tracking.log`, by which a step of `fit` ends: add our metrics to verl's, and put the step on record."""
    driver, metrics = VerlV0Driver.running(), argument(wrapped, args, kwargs, "data")
    # A validation before the first step is logged, too.
    if driver is not None and driver.logs_whole_steps and "perf/throughput" in metrics:
        driver.end_step(driver.trainer.global_steps, metrics)
    return wrapped(*args, **kwargs)


def too_late(config: Any) -> Conflict:
    """Say what is wrong where this process has been reached after the workers were started."""
    key = "actor_rollout_ref.model.external_lib"
    reason = "this release imports it in the trainer's process after the workers have started"
    return Conflict(key, config.actor_rollout_ref.model.get("external_lib"), reason, "start with `fp16-patch run --`")


def _check_before(trainer: Any, workers: Any, method: str, role: str) -> None:
    def checked(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return driver_of(trainer).update(role, wrapped, args, kwargs)

    _wrap(workers, method, checked)


def _observe_in(trainer: Any, workers: Any, method: str) -> None:
    def observed(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        # A worker group's methods have no parameters with names.
        batch = kwargs["data"] if "data" in kwargs else args[0]
        driver = driver_of(trainer)
        with driver.ordering(batch.meta_info):
            result = wrapped(*args, **kwargs)
        if "rollout_log_probs" in batch.batch.keys():  # noqa: SIM118, a TensorDict iterates over its rows
            driver.expect_batch(batch.batch)
        return result

    _wrap(workers, method, observed)


def _wrap(workers: Any, method: str, hook: Hook) -> None:
    """Wrap a worker group's method, which is made at run time, so that no patch can name it."""
    part = our_part(f"what goes around the workers' {method}")
    wrapt.wrap_function_wrapper(workers, method, guarded(hook, part))
