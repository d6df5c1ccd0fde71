"""Plant mistakes that people make in RL setups, and accidents that befall clusters, into a real verl run.

verl imports this in every process (`VERL_USE_EXTERNAL_MODULES`). `PLANTED` names what to plant, comma-separated;
`name@3` is an accident of step 3. Causes are planted where the framework makes the data, accidents on the monitor's own
processes and files, and on its public classes. What was planted says `planted: name` on standard output when it takes
effect, so that whoever reads the log knows that it did.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wrapt

SAMPLER_TEMPERATURE = 0.8
SLOW_S = 30.0
_said: set[str] = set()


def sampler_temperature(_step: int) -> None:
    """The sampler draws at a temperature of its own, and reports the log-probs at that temperature."""
    _wrap("verl.workers.rollout.llm_server", "LLMServerClient.generate", _hotter)


def sync_dropped(_step: int) -> None:
    """The sampler keeps the weights it was started with."""
    _wrap(
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngine.get_per_tensor_param",
        _Stale("sync_dropped", behind=None),
    )


def sync_late(_step: int) -> None:
    """The sampler gets each update one step late."""
    _wrap("verl.workers.engine.fsdp.transformer_impl", "FSDPEngine.get_per_tensor_param", _Stale("sync_late", behind=1))


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
    """The monitor's root dies."""
    _at_step(step, lambda: _kill_actors("root_killed", "/root"))


def aggregator_killed(step: int) -> None:
    """The aggregator of each node dies."""
    _at_step(step, lambda: _kill_actors("aggregator_killed", "/node/"))


def disk_full(step: int) -> None:
    """Writes fail for one step."""
    _in_place_of_the_log("disk_full", step, lambda path: path.symlink_to("/dev/full"), lambda path: path.unlink())


def slow_sink(step: int) -> None:
    """A write does not return for `SLOW_S` seconds."""
    _in_place_of_the_log("slow_sink", step, _stall, lambda path: None)


def monitor_raises(step: int) -> None:
    """The statistics of the step's tokens raise, on every rank."""

    def raising(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        # The learner against itself is compared without tokens.
        calls["seen"] += "token_ids" in kwargs
        if calls["seen"] == step and "token_ids" in kwargs:
            _say("monitor_raises")
            raise RuntimeError("planted")
        return wrapped(*args, **kwargs)

    calls = {"seen": 0}
    _wrap("fp16_patch.mismatch.statistics.summary", "MismatchStats.from_log_probs", raising)


def monitor_every_other_step(_step: int) -> None:
    """Even steps go without the monitor: no rank is told to observe, and nothing goes on record."""

    def step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
        this["watched"] = bool(trainer.global_steps % 2)
        return wrapped(*args, **kwargs)

    def end_step(wrapped: Any, monitor: Any, args: Any, kwargs: Any) -> Any:
        if this["watched"]:
            return wrapped(*args, **kwargs)
        return _say("monitor_every_other_step")

    def measure_at_times(module: Any) -> None:
        measures = module.RunMonitor.measures.fget
        module.RunMonitor.measures = property(lambda monitor: this["watched"] and measures(monitor))

    this = {"watched": True}
    _wrap("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.step", step)
    _wrap("fp16_patch.mismatch.run_monitor", "RunMonitor.end_step", end_step)
    wrapt.register_post_import_hook(measure_at_times, "fp16_patch.mismatch.run_monitor")


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
    """Wrap a function of a module as soon as that is imported.

    Raises:
        AttributeError: there is no such function, from the import of the module.
    """
    wrapt.register_post_import_hook(lambda loaded: wrapt.wrap_function_wrapper(loaded, name, wrapper), module)


def _say(name: str) -> None:
    """Leave word in the log that a plant took effect, once a process."""
    if name not in _said:
        _said.add(name)
        print(f"planted: {name}", flush=True)


async def _hotter(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    _say("sampler_temperature")
    sampling = {**kwargs["sampling_params"], "temperature": SAMPLER_TEMPERATURE}
    return await wrapped(*args, **{**kwargs, "sampling_params": sampling})


class _Stale:
    """Hands out the weights of an earlier call: the first one's, or those of `behind` calls ago."""

    def __init__(self, name: str, behind: int | None) -> None:
        self._name, self._behind = name, behind
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
        _say(self._name)
        return ((name, tensor.clone()) for name, tensor in self._kept[0]), adapter


def _one_too_many(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("response_logprobs"):
        _say("mask_past_the_end")
        kwargs = {
            **kwargs,
            "response_ids": [*kwargs["response_ids"], kwargs["response_ids"][-1]],
            "response_mask": [*kwargs["response_mask"], 1],
            "response_logprobs": [*kwargs["response_logprobs"], 0.0],
        }
    return wrapped(*args, **kwargs)


def _shifted(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("response_logprobs"):
        _say("log_probs_shifted")
        kwargs = {**kwargs, "response_logprobs": [0.0, *kwargs["response_logprobs"][:-1]]}
    return wrapped(*args, **kwargs)


def _with_nan(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if len(kwargs.get("response_logprobs") or []) > 1:
        _say("sampler_nan")
        first, _, *rest = kwargs["response_logprobs"]
        kwargs = {**kwargs, "response_logprobs": [first, math.nan, *rest]}
    return wrapped(*args, **kwargs)


def _at_step(step: int, accident: Callable[[], None]) -> None:
    def on_step(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
        if trainer.global_steps == step:
            accident()
        return wrapped(*args, **kwargs)

    _wrap("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage", on_step)


def _kill_actors(name: str, part: str) -> None:
    import ray
    from ray.util import list_named_actors

    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == "fp16_patch" and part in actor["name"]:
            _say(name)
            ray.kill(ray.get_actor(actor["name"], namespace="fp16_patch"), no_restart=False)


def _in_place_of_the_log(name: str, step: int, put: Callable[[Path], None], take: Callable[[Path], None]) -> None:
    """Put something in the place of the monitor's log at a step, and take it away at the next."""
    path = Path(os.environ["PLANTED_LOG"])
    kept = path.with_suffix(".kept")

    def before() -> None:
        _say(name)
        path.rename(kept)
        put(path)

    def after() -> None:
        take(path)
        kept.rename(path)

    _at_step(step, before)
    _at_step(step + 1, after)


def _stall(path: Path) -> None:
    """Put a pipe there that nobody reads: opening it to write blocks until somebody does."""
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
