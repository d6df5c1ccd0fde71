"""Drives OpenRLHF's runs: reads the arguments, and finds actor groups and engines."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fp16_patch.mismatch.collection import actors
from fp16_patch.openrlhf.config.arguments import get
from fp16_patch.openrlhf.config.caveats import buffers_keep_prompts, caveats_of
from fp16_patch.openrlhf.samplers import weight_versions
from fp16_patch.runtime.driver import FrameworkDriver
from fp16_patch.vllm import server
from fp16_patch.vllm.sampler import VLLM

_GROUPS = {
    "actor": "actor_model_group",
    "critic": "critic_model_group",
    "reward": "reward_model_group",
    "ref": "reference_model_group",
}


class OpenRLHFDriver(FrameworkDriver):
    """Drives a run of `PPOTrainer`, asynchronous or not."""

    framework = "openrlhf"

    def reconcile(self) -> None:
        """Do nothing: the strategy met the plan when it was built from the arguments."""

    def caveats(self) -> list[str]:
        return caveats_of(self.trainer.args)

    def model(self) -> str | None:
        return get(self.trainer.args, "actor.model_name_or_path")  # type: ignore[no-any-return]

    def sampler(self) -> str:
        return VLLM.name

    def checkpoints(self) -> Path:
        return Path(get(self.trainer.args, "ckpt.path"))

    def run_name(self) -> str:
        # OpenRLHF's calls to a rank have no room for a name of ours: the ranks derive the job's.
        return actors.job_run()

    def refresh_attestations(self) -> None:
        server.refresh_records(self._engines())

    def actors(self) -> list[tuple[str, Any]]:
        groups = [getattr(self.trainer, attribute) for attribute in _GROUPS.values()]
        workers = [("worker", worker) for group in groups if group is not None for worker in group._actor_handlers]
        return workers + [("server", engine) for engine in self._engines()]

    def required_quantities(self, updated: Collection[str]) -> dict[str, tuple[str, ...]]:
        computed, trained = ("parameter", "activation"), ("gradient", "master")
        synced = ("wire",) if "actor" in updated else ()
        required: dict[str, tuple[str, ...]] = {}
        if self._engines():
            required["rollout"] = ("engine_weight", "kv_cache", "activation", *synced)
        for role, attribute in _GROUPS.items():
            if getattr(self.trainer, attribute) is not None:
                output = "log_prob" if role in ("actor", "ref") else "value"
                required[role] = (*computed, output, *(trained if role in updated else ()))
        return required

    def request_attestations(self) -> None:
        """Have the engines watch their first rollout, without waiting for them."""
        server.request_records(self._engines())

    def follow_versions(self) -> None:
        """Have the engines note the weights of what they sample, where these may be older than the learner's."""
        if self.measures and get(self.trainer.args, "train.async_enable") and buffers_keep_prompts():
            weight_versions.watch(self._engines())

    def update(self, step: int, wrapped: Callable[..., dict[str, Any]], args: Any, kwargs: Any) -> dict[str, Any]:
        """Call what updates the engines, and returns the status of those that took part; see `checked_update`."""
        return self.checked_update(step, lambda: wrapped(*args, **kwargs), _trained_roles)

    def _engines(self) -> list[Any]:
        return self.trainer.vllm_engines or []


def _trained_roles(status: Collection[str]) -> list[str]:
    return [role for role in ("actor", "critic") if f"{role}_lr" in status]
