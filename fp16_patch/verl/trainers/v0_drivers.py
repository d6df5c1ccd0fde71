"""Drives runs of verl's V0 trainer (`RayPPOTrainer`), and of those made of it with samplers of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from fp16_patch.runtime.preflight import ANSWER_TIMEOUT_S
from fp16_patch.verl.trainers.driver import VerlDriver, servers_of

_CHECKPOINT_MANAGERS = ("checkpoint_manager", "hybrid_checkpoint_manager")


class VerlV0Driver(VerlDriver):
    """Drives a run of `RayPPOTrainer`."""

    kind = "task_runner_v0"
    logs_whole_steps: ClassVar[bool] = True
    """Whether what the trainer logs with a throughput is one whole step."""


class VerlSeparateDriver(VerlV0Driver):
    """Drives a run of `FullyAsyncTrainer`, in an actor of its own, or of `OneStepOffRayTrainer`."""

    logs_whole_steps: ClassVar[bool] = False

    def servers(self) -> list[Any]:
        """Find the servers by those who send them weights, too: in fully asynchronous runs another actor has them."""
        managers = [getattr(self.trainer, name, None) for name in _CHECKPOINT_MANAGERS]
        synced = [server for manager in managers if manager is not None for server in servers_of(manager)]
        return [*super().servers(), *synced, *self._of_rollouter()]

    def actors(self) -> list[tuple[str, Any]]:
        rollouter = getattr(self.trainer, "rollouter", None)
        return [*super().actors(), *([] if rollouter is None else [("rollouter", rollouter)])]

    def _of_rollouter(self) -> Iterable[Any]:
        """Ask the actor that has samples made for the servers of its reward models and teachers.

        One that does not answer is found out when it is asked for its own record.
        """
        rollouter = getattr(self.trainer, "rollouter", None)
        if rollouter is None:
            return ()
        import ray

        try:
            return ray.get(  # type: ignore[no-any-return]
                rollouter.__ray_call__.remote(served_beside_the_policy), timeout=ANSWER_TIMEOUT_S
            )
        except Exception:
            return ()


def served_beside_the_policy(rollouter: Any) -> list[Any]:
    """Return the handles of the servers that this rollouter has; it runs there."""
    return VerlSeparateDriver(rollouter).own_servers()


def is_rollouter(trainer: Any) -> bool:
    """Return whether it has samples made for a trainer in another actor, on verl's base of trainers."""
    return hasattr(trainer, "reset_staleness")


def driver_of(trainer: Any) -> VerlV0Driver:
    """Return the driver of a trainer that is a `RayPPOTrainer`, or made of one."""
    return (VerlSeparateDriver if hasattr(trainer, "_fit_collect_metrics") else VerlV0Driver).of(trainer)
