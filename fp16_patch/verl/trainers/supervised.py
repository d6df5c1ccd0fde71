"""Hooks into verl's SFT trainers: `sft_trainer`, whose ranks torchrun starts, and `sft_trainer_ray`, with a driver.

The trainer is a part of the program that is run, `__main__`, where no patch reaches it: the hooks are in what it
imports. Under torchrun each rank reads the configuration and judges itself. With Ray the driver does the first, and
asks its workers.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import wrapt

from fp16_patch.patching.call_arguments import argument
from fp16_patch.patching.guarded_hook import guarded
from fp16_patch.runtime import preflight
from fp16_patch.runtime.activation import current_plan, our_part, refine
from fp16_patch.runtime.driver import FrameworkDriver
from fp16_patch.verl.config import settings as verl_config
from fp16_patch.verl.config import supervised
from fp16_patch.verl.trainers.driver import without_suffix

logger = logging.getLogger(__name__)

# Seen on every rank when it has computed a batch; of a pipeline, the last stage alone has log-probs.
_COMPUTED = {supervised.ROLE: ("autocast", "parameter", "activation", "gradient", "master")}
_OURS, _NORM = "fp16/", "train/grad_norm"
_TRAIN = "train_batch"

_config: Any = None


def auto_set_device(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`auto_set_device`, which each program of verl calls first: reconcile plan and configuration of an SFT trainer."""
    result = wrapped(*args, **kwargs)
    config = argument(wrapped, args, kwargs, "config")
    if current_plan().active and supervised.is_supervised(config):
        _prepare(config)
    return result


def worker_group(wrapped: Any, workers: Any, args: Any, kwargs: Any) -> Any:
    """`RayWorkerGroup.__init__`: in the driver of an SFT trainer, check the workers before they are first updated."""
    result = wrapped(*args, **kwargs)
    if _config is not None and hasattr(workers, _TRAIN):
        SupervisedDriver.of(workers).begin()
        part = our_part(f"what goes around the workers' {_TRAIN}")
        # A worker group's methods are made at run time, so that no patch can name them.
        wrapt.wrap_function_wrapper(workers, _TRAIN, guarded(partial(_train_batch, workers), part))
    return result


def log(wrapped: Any, tracking: Any, args: Any, kwargs: Any) -> Any:
    """`Tracking.log`, by which an SFT step ends: one number for each outcome, and no norm of a skipped step."""
    metrics = argument(wrapped, args, kwargs, "data")
    if _config is not None and any(name.startswith(_OURS) for name in metrics):
        reduce_outcomes(metrics)
        if (driver := SupervisedDriver.running()) is not None:
            driver.end_step(argument(wrapped, args, kwargs, "step"), metrics, observed=False)
            # The program ends without a call that tells.
            driver.flush()
    return wrapped(*args, **kwargs)


class SupervisedDriver(FrameworkDriver):
    """Drives a run of `sft_trainer_ray`: no sampler, and no pass before the first update shows what is computed in.

    Attributes:
        trainer: the group of workers; the trainer itself is in no call that we see.
        step: the number of updates of this process.
    """

    framework = "verl"
    kind = "supervised_driver"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.step = 0

    def reconcile(self) -> None:
        """Do nothing: plan and configuration met before Ray was started."""

    def refresh_attestations(self) -> None:
        """Do nothing: there is no sampler."""

    def actors(self) -> list[tuple[str, Any]]:
        return [("worker", worker) for worker in self.trainer.workers]

    def required_quantities(self, updated: Collection[str]) -> Mapping[str, tuple[str, ...]]:
        return _COMPUTED if updated else {}

    def caveats(self) -> list[str]:
        return []

    def model(self) -> str:
        return str(_config.model.path)

    def sampler(self) -> None:
        return None

    def checkpoints(self) -> Path:
        return Path(_config.trainer.default_local_dir)

    def update(self, update: Callable[[], Any]) -> Any:
        """Update the model if every worker is live; each judges its own dtypes before it takes the first step."""

        def begin() -> Any:
            _have_them_judge_themselves(self.trainer.workers)
            return update()

        self.step += 1
        return self.checked_update(self.step, begin if self.step == 1 else update, lambda _: (supervised.ROLE,))


def reduce_outcomes(metrics: dict[str, Any]) -> None:
    """Make one number of what the ranks say of an outcome, by the name that verl reduces by, and drop the suffix.

    The norm of a skipped step is dropped, too: it is none of a step.
    """
    from verl.utils.metric import reduce_metrics

    raw = {name: metrics.pop(name) for name in list(metrics) if name.startswith(_OURS)}
    for name, value in reduce_metrics(raw).items():
        metrics[without_suffix(name)] = float(value)
    if not math.isfinite(metrics.get(_NORM, 0.0)) and current_plan().overrides_dtype:
        del metrics[_NORM]


def _prepare(config: Any) -> None:
    """Refine the plan by the run's own settings, check the run under it, write it into the run.

    Raises:
        PlanError: a setting is wrong, or cannot be had under the plan.
    """
    global _config
    _config = config
    plan = refine(verl_config.plan_settings(config), source=verl_config.SECTION)
    supervised.check(config, plan)
    changed = supervised.apply_to(config, plan) if plan.overrides_dtype else []
    preflight.check_itself(None, SupervisedDriver.framework, _COMPUTED)
    if os.environ.get("RANK", "0") != "0":
        return
    if changed:
        keys = "\n  ".join(changed)
        logger.warning("the model computes in %s; the configuration said otherwise:\n  %s", plan.dtype, keys)
    for slow in supervised.slow_paths_of(config, plan):
        logger.warning("%s", slow)


def _have_them_judge_themselves(workers: Any) -> None:
    import ray

    call = partial(preflight.check_itself, framework=SupervisedDriver.framework, required=_COMPUTED)
    ray.get([worker.__ray_call__.remote(call) for worker in workers], timeout=preflight.ANSWER_TIMEOUT_S)


def _train_batch(workers: Any, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """A worker group's `train_batch`: ask every worker before it."""
    return _Answer(SupervisedDriver.of(workers).update(partial(wrapped, *args, **kwargs)))


class _Answer(wrapt.ObjectProxy):  # type: ignore[type-arg]  # it is none at run time
    """An update's answer, in which this trainer always finds a norm: it takes one out without asking."""

    def get(self) -> Any:
        from verl.utils import tensordict_utils

        output = self.__wrapped__.get()
        tensordict_utils.get(output, "metrics").setdefault("grad_norm", math.nan)
        return output
