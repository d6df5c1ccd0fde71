"""Drives verl's runs: reads the composed configuration, and finds workers and servers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fp16_patch.plan.errors import PlanError
from fp16_patch.runtime.activation import current_plan, refine
from fp16_patch.runtime.driver import FrameworkDriver
from fp16_patch.verl.config import settings as verl_config
from fp16_patch.verl.config.caveats import caveats_of
from fp16_patch.verl.config.samplers import REWARD, TEACHER, policy_sampler, served_models
from fp16_patch.verl.trainers.known import unknown_trainer
from fp16_patch.verl.trainers.observation import ORDER

logger = logging.getLogger(__name__)

_OUTCOME_SUFFIXES = ("/min", "/max")
_WORKER_GROUPS = ("actor_rollout_wg", "critic_wg", "ref_policy_wg", "rm_wg")


class VerlDriver(FrameworkDriver):
    """Drives a run of `PPOTrainer`."""

    framework = "verl"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._passes = 0

    def reconcile(self) -> None:
        """Refuse a trainer that updates past us, then reconcile plan and configuration.

        Raises:
            PlanError: nobody would check before its updates, or a setting cannot be had under the plan.
        """
        if current_plan().overrides_dtype and (other := unknown_trainer(type(self.trainer))):
            raise PlanError([other])
        prepare(self.trainer.config)

    def refresh_attestations(self) -> None:
        """Do nothing: the workers of verl's servers publish what they hold whenever it changes."""

    def caveats(self) -> list[str]:
        return caveats_of(self.trainer.config)

    def model(self) -> str:
        return str(self.trainer.config.actor_rollout_ref.model.path)

    def sampler(self) -> str | None:
        sampler = policy_sampler(self.trainer.config)
        return None if sampler is None else sampler.name

    def checkpoints(self) -> Path:
        return Path(self.trainer.config.trainer.default_local_dir)

    def actors(self) -> list[tuple[str, Any]]:
        groups = [getattr(self.trainer, name, None) for name in _WORKER_GROUPS]
        workers = [("worker", worker) for group in groups if group is not None for worker in group.workers]
        servers = [("server", server) for server in self.servers()]
        # Colocated roles share their workers.
        return list({handle._actor_id: (kind, handle) for kind, handle in workers + servers}.values())

    def servers(self) -> list[Any]:
        """Find the servers of every sampler of this run: hybrid and standalone rollout, reward model, teachers."""
        return self.own_servers()

    def own_servers(self) -> list[Any]:
        """Find the servers that this process has started."""
        return [server for manager in _sampler_managers(self.trainer) for server in servers_of(manager)]

    def required_quantities(self, updated: Collection[str]) -> dict[str, tuple[str, ...]]:
        trainer, config = self.trainer, self.trainer.config
        computed, trained = ("autocast", "parameter", "activation"), ("gradient", "master")
        generated = () if verl_config.replays_rollouts(config) else ("activation",)
        required: dict[str, tuple[str, ...]] = {"rollout": ("wire", "engine_weight", "kv_cache", *generated)}
        if not verl_config.bypasses_old_log_probs(config) or "actor" in updated:
            required["actor"] = (*computed, "log_prob")
        if trainer.use_reference_policy and not trainer.ref_in_actor:
            required["ref"] = (*computed, "log_prob")
        if trainer.use_critic:
            required["critic"] = (*computed, "value")
        served = {sampler.section: sampler.role for sampler in served_models(config)}
        if REWARD in served:
            required["reward"] = ("engine_weight",)
        if any(role.startswith(TEACHER) for role in served.values()):
            required[TEACHER] = ("engine_weight",)
        return {role: (*seen, *(trained if role in updated else ())) for role, seen in required.items()}

    def end_step(self, step: int, metrics: dict[str, Any], *, observed: bool = True) -> None:
        rename_outcomes(metrics)
        super().end_step(step, metrics, observed=observed)

    def update(self, role: str, wrapped: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call what updates this role's engine; see `checked_update`."""
        return self.checked_update(self.trainer.global_steps, lambda: wrapped(*args, **kwargs), lambda _: (role,))

    def update_actor(self, wrapped: Callable[..., Any], args: Any, kwargs: Any, extra: MutableMapping[str, Any]) -> Any:
        """Call what updates the actor's engine, which is the one pass over samples where nothing scores them before.

        Args:
            extra: what goes along with the batch.
        """
        scores = verl_config.bypasses_old_log_probs(self.trainer.config)
        with self.ordering(extra, restored=False) if scores else nullcontext():
            return self.update("actor", wrapped, args, kwargs)

    @contextmanager
    def ordering(self, extra: MutableMapping[str, Any], *, restored: bool | None = None) -> Iterator[None]:
        """Order the ranks to observe, by an entry in what goes along with the batch, in this pass only.

        Args:
            restored: the pass is by the weights of the last sync; by default, if this trainer restores them to score.
        """
        if self.monitor is not None and self.monitor.measures:
            restored = self._restores_synced() if restored is None else restored
            self._passes += 1
            extra[ORDER] = json.dumps([*self.monitor.order, self._passes, self.samples_ahead(), restored])
        try:
            yield
        finally:
            extra.pop(ORDER, None)

    def samples_ahead(self) -> bool:
        """Return whether samplers draw with older weights than the learner's by design."""
        return verl_config.samples_ahead(self.trainer.config) is not None

    def _restores_synced(self) -> bool:
        """Return whether the trainer restores the weights of the last sync before it scores samples.

        Those that update several times between syncs do, so that all samples of a sync are scored by one policy.
        """
        workers = getattr(self.trainer, "actor_rollout_wg", None)
        return hasattr(self.trainer, "local_trigger_step") and hasattr(workers, "restore_model_from_cpu")

    def expect_batch(self, batch: Any) -> None:
        """Expect the ranks to have observed this batch's sampled tokens."""
        if self.measures:
            self.expect(int(batch["response_mask"].sum()))


def prepare(config: Any) -> None:
    """Refine the plan by the run's own `fp16_patch` settings, check the run under it, write it into the run.

    Raises:
        PlanError: a setting is wrong, or cannot be had under the plan.
    """
    plan = refine(verl_config.plan_settings(config), source=verl_config.SECTION)
    verl_config.check(config, plan)
    changed = verl_config.apply_to(config, plan) if plan.overrides_dtype else []
    if changed:
        keys = "\n  ".join(changed)
        logger.warning("every role computes in %s; the configuration said otherwise:\n  %s", plan.dtype, keys)
    for slow in verl_config.slow_paths_of(config, plan):
        logger.warning("%s", slow)


def rename_outcomes(metrics: dict[str, Any]) -> None:
    """Rename `actor/fp16/loss_scale/min` to `fp16/loss_scale`, and the critic's to `fp16/critic/…`."""
    for role, prefix in (("actor", "fp16/"), ("critic", "fp16/critic/")):
        for raw in [name for name in metrics if name.startswith(f"{role}/fp16/")]:
            metrics[prefix + without_suffix(raw.removeprefix(f"{role}/fp16/"))] = metrics.pop(raw)


def without_suffix(name: str) -> str:
    """Return a metric's name without what verl aggregates by, which goes last."""
    return next((name.removesuffix(suffix) for suffix in _OUTCOME_SUFFIXES if name.endswith(suffix)), name)


def _sampler_managers(trainer: Any) -> list[Any]:
    """Find whatever the trainer keeps servers in, which differs between trainers and releases; some of it has none."""
    agents, rewards = getattr(trainer, "async_rollout_manager", None), getattr(trainer, "reward_loop_manager", None)
    listed = getattr(trainer, "_rollout_server_managers", None)
    managers = listed() if listed else [getattr(trainer, "llm_server_manager", None), agents]
    managers += [getattr(holder, "reward_model_manager", None) for holder in (rewards, agents)]
    teachers = getattr(trainer, "teacher_model_manager", None)
    return [*managers, *getattr(teachers, "teacher_model_managers", {}).values()]


def servers_of(manager: Any) -> list[Any]:
    """Return the handles of the servers behind what starts them, or sends them weights."""
    if hasattr(manager, "async_llm_servers"):
        return list(manager.async_llm_servers)
    get = getattr(manager, "get_replicas", None)
    replicas = get() if get is not None else getattr(manager, "rollout_replicas", getattr(manager, "replicas", ()))
    return [server for replica in replicas for server in replica.servers]
