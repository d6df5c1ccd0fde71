"""Hooks into OpenRLHF's vLLM engines: gives them the plan's dtype, and keeps the sampled tokens' log-probs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fp16_patch.patching.call_arguments import argument, bound, takes
from fp16_patch.patching.sources import Installed
from fp16_patch.plan.plan import KIND_ENV, ROLE_ENV
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import current_plan, ledger, our_part
from fp16_patch.samplers.holdings import role, tell
from fp16_patch.vllm.engine import note_engine

_LOG_PROBS = {"logprobs_mode": "processed_logprobs"}
# What OpenRLHF calls the Ray actor that holds an engine.
_ENGINES = ("RolloutRayActor", "LLMRayActor")
# Called from within the framework's function, where its hook's guard does not tell ours from its own.
_PLANNING = our_part("what gives vLLM's engines and requests the plan's settings")


def create_vllm_engines(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`create_vllm_engines`, which has bfloat16 written in: give the engines it starts the plan's dtype.

    Not the actor's own methods: Ray sends an actor's class by value, and a wrapper on them is lost on the way.
    """
    if takes(wrapped, "llm_actor_cls"):
        call = bound(wrapped, args, kwargs)
        call.apply_defaults()
        call.arguments["llm_actor_cls"] = _PlannedEngine(call.arguments["llm_actor_cls"])
        return wrapped(*call.args, **call.kwargs)
    module = sys.modules[wrapped.__module__]
    name = next(name for name in _ENGINES if hasattr(module, name))
    with _standing_in(wrapped.__module__, name, _PlannedEngine):
        return wrapped(*args, **kwargs)


def dispatch_prompts(wrapped: Any, generator: Any, args: Any, kwargs: Any) -> Any:
    """`SamplesGenerator._dispatch_prompts_to_vllm`: ask for the sampled tokens' log-probs, corrected for or not."""
    with _standing_in(wrapped.__module__, "SamplingParams", _with_log_probs):
        return wrapped(*args, **kwargs)


def generate(wrapped: Any, generator: Any, args: Any, kwargs: Any) -> Any:
    """`_generate_vllm` of 0.8.9 to 0.9.0: keep log-probs, which it does only if they are to correct the loss.

    For the length of the call they are; the loss is computed in other processes.
    """
    run = generator.strategy.args
    corrects = run.enable_vllm_is_correction
    run.enable_vllm_is_correction = True
    try:
        return wrapped(*args, **kwargs)
    finally:
        run.enable_vllm_is_correction = corrects


def update_weight(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
    """`WorkerWrap.update_weight` and `update_weight_cuda_ipc`: note what came over the wire and what it became."""
    result = wrapped(*args, **kwargs)
    arrived = argument(wrapped, args, kwargs, "dtype")
    # Once for each dtype: this is called for every parameter.
    if ledger().note(role(), "wire", arrived):
        note_engine(role(), worker)
        tell()
    return result


def engine_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what OpenRLHF passes to an engine, with the plan's dtype and log-probs comparable with the learner's."""
    planned = {**(_LOG_PROBS if _vllm_knows("logprobs_mode") else {}), **arguments}
    if current_plan().overrides_dtype:
        planned["dtype"] = current_plan().dtype
    return planned


def _vllm_knows(setting: str) -> bool:
    """Return whether the installed vLLM's engines take such an argument; its source is read, not imported."""
    return setting in (Installed().read("vllm.engine.arg_utils") or setting)


class _PlannedEngine:
    """Stands in for the Ray actor class while engines are created."""

    def __init__(self, actor_class: Any) -> None:
        self._actor_class = actor_class

    def options(self, **options: Any) -> _PlannedEngine:
        planned = _PLANNING.run(lambda: _server_options(options))
        return _PlannedEngine(self._actor_class.options(**(options if planned is None else planned)))

    def remote(self, *args: Any, **arguments: Any) -> Any:
        planned = _PLANNING.run(lambda: engine_arguments(arguments))
        return self._actor_class.remote(*args, **(arguments if planned is None else planned))


def _server_options(options: dict[str, Any]) -> dict[str, Any]:
    environment = propagation.with_carried_environment(options.get("runtime_env"))
    environment["env_vars"].update({KIND_ENV: "server", ROLE_ENV: "rollout"})
    return {**options, "runtime_env": environment}


def _with_log_probs(sampling_params: Any) -> Any:
    def make(*args: Any, **settings: Any) -> Any:
        return sampling_params(*args, **{**settings, "logprobs": settings.get("logprobs") or 1})

    return make


@contextmanager
def _standing_in(module_name: str, name: str, stand_in: Any) -> Iterator[None]:
    """Replace what a module's function looks up by `name` for the length of one call."""
    module = sys.modules[module_name]
    original = getattr(module, name)
    setattr(module, name, stand_in(original))
    try:
        yield
    finally:
        setattr(module, name, original)
