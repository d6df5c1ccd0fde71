"""Mistakes that people make in RL setups, and accidents that befall clusters, planted into a real verl run.

verl imports this in every process (`VERL_USE_EXTERNAL_MODULES`). `PLANTED` names what to plant, comma-separated;
`name@3` is an accident of step 3. Nothing here is in the monitor's way: causes are planted where the framework makes
the data, accidents on the monitor's own processes and files.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wrapt

SAMPLER_TEMPERATURE = 0.8
SLOW_S = 30.0


def sampler_temperature(_step: int) -> None:
    """The sampler draws at a temperature of its own, and reports the log-probs at that temperature."""
    _wrap("verl.workers.rollout.llm_server", "LLMServerClient.generate", _hotter)


def sync_dropped(_step: int) -> None:
    """The sampler keeps the weights it was started with."""
    _wrap("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.get_per_tensor_param", _Stale(behind=None))


def sync_late(_step: int) -> None:
    """The sampler gets each update one step late."""
    _wrap("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.get_per_tensor_param", _Stale(behind=1))


def mask_past_the_end(_step: int) -> None:
    """The mask covers one position after the last sampled token, where the sampler has no log-prob."""
    _wrap("verl.experimental.agent_loop.agent_loop", "AgentLoopOutput.__init__", _one_too_many)


def log_probs_shifted(_step: int) -> None:
    """The sampler's log-probs are off by one against the tokens."""
    _wrap("verl.experimental.agent_loop.agent_loop", "AgentLoopOutput.__init__", _shifted)


def sampler_nan(_step: int) -> None:
    """The sampler reports NaN for the second token of each response."""
    _wrap("verl.experimental.agent_loop.agent_loop", "AgentLoopOutput.__init__", _with_nan)


def root_killed(step: int) -> None:
    _at_step(step, lambda: _kill_actors("/root"))


def aggregator_killed(step: int) -> None:
    _at_step(step, lambda: _kill_actors("/node/"))


def disk_full(step: int) -> None:
    """Writes fail for one step."""
    _in_place_of_the_log(step, lambda path: path.symlink_to("/dev/full"), lambda path: path.unlink())


def slow_sink(step: int) -> None:
    """A write does not return for `SLOW_S` seconds."""
    _in_place_of_the_log(step, _stall, lambda path: None)


def monitor_raises(step: int) -> None:
    """The statistics raise, on every rank."""

    def raising(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls["seen"] += 1
        if calls["seen"] == step:
            raise RuntimeError("planted")
        return wrapped(*args, **kwargs)

    calls = {"seen": 0}
    _wrap("fp16_patch.verl.trainers.observation", "_compare", raising)


def monitor_every_other_step(_step: int) -> None:
    """Even steps go without the monitor."""

    def step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
        hooks = sys.modules["fp16_patch.verl.trainers.v1"]
        kept.setdefault("monitor", hooks._monitor)
        hooks._monitor = kept["monitor"] if trainer.global_steps % 2 else None
        return wrapped(*args, **kwargs)

    kept: dict[str, Any] = {}
    _wrap("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.step", step)


PLANTS: dict[str, Callable[[int], None]] = {
    plant.__name__: plant
    for plant in (
        sampler_temperature,
        sync_dropped,
        sync_late,
        mask_past_the_end,
        log_probs_shifted,
        sampler_nan,
        root_killed,
        aggregator_killed,
        disk_full,
        slow_sink,
        monitor_raises,
        monitor_every_other_step,
    )
}


def _wrap(module: str, name: str, wrapper: Any) -> None:
    wrapt.register_post_import_hook(lambda loaded: wrapt.wrap_function_wrapper(loaded, name, wrapper), module)


async def _hotter(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    sampling = {**kwargs["sampling_params"], "temperature": SAMPLER_TEMPERATURE}
    return await wrapped(*args, **{**kwargs, "sampling_params": sampling})


class _Stale:
    """Hands out the weights of an earlier call: the first one's, or those of ``behind`` calls ago."""

    def __init__(self, behind: int | None) -> None:
        self._behind = behind
        self._kept: list[list[tuple[str, Any]]] = []

    def __call__(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        parameters, adapter = wrapped(*args, **kwargs)
        if self._behind is None and self._kept:
            for _ in parameters:  # gathering is collective
                pass
        else:
            self._kept.append([(name, tensor.detach().clone()) for name, tensor in parameters])
        oldest = 0 if self._behind is None else max(0, len(self._kept) - 1 - self._behind)
        self._kept = self._kept[oldest:]
        return ((name, tensor.clone()) for name, tensor in self._kept[0]), adapter


def _one_too_many(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("response_logprobs"):
        kwargs = {
            **kwargs,
            "response_ids": [*kwargs["response_ids"], kwargs["response_ids"][-1]],
            "response_mask": [*kwargs["response_mask"], 1],
            "response_logprobs": [*kwargs["response_logprobs"], 0.0],
        }
    return wrapped(*args, **kwargs)


def _shifted(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("response_logprobs"):
        kwargs = {**kwargs, "response_logprobs": [0.0, *kwargs["response_logprobs"][:-1]]}
    return wrapped(*args, **kwargs)


def _with_nan(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if len(kwargs.get("response_logprobs") or []) > 1:
        first, _, *rest = kwargs["response_logprobs"]
        kwargs = {**kwargs, "response_logprobs": [first, math.nan, *rest]}
    return wrapped(*args, **kwargs)


def _at_step(step: int, accident: Callable[[], None]) -> None:
    def on_step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
        if trainer.global_steps == step:
            accident()
        return wrapped(*args, **kwargs)

    _wrap("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage", on_step)


def _kill_actors(part: str) -> None:
    import ray
    from ray.util import list_named_actors

    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == "fp16_patch" and part in actor["name"]:
            print(f"planted: killing {actor['name']}", flush=True)
            ray.kill(ray.get_actor(actor["name"], namespace="fp16_patch"), no_restart=False)


def _in_place_of_the_log(step: int, put: Callable[[Path], None], take: Callable[[Path], None]) -> None:
    path = Path(os.environ["PLANTED_LOG"])
    kept = path.with_suffix(".kept")

    def before() -> None:
        path.rename(kept)
        put(path)

    def after() -> None:
        take(path)
        kept.rename(path)

    _at_step(step, before)
    _at_step(step + 1, after)


def _stall(path: Path) -> None:
    """A pipe that nobody reads: opening it to write blocks until somebody does."""
    os.mkfifo(path)
    aside = path.with_suffix(".pipe")

    def read() -> None:
        # The pipe is out of the way by then; whoever waits has it open by its old name.
        with aside.open("rb") as pipe:
            pipe.read()

    os.link(path, aside)
    threading.Timer(SLOW_S, read).start()


def _plant() -> None:
    for name, _, step in (entry.partition("@") for entry in os.environ.get("PLANTED", "").split(",") if entry):
        PLANTS[name](int(step or 0))


_plant()
