"""Notes, in the Ray actor that holds an engine, how many broadcasts of weights each token of a response comes after.

vLLM can be told a version of its weights, but says of no token which one it was sampled with. The learner's ranks count
the same broadcasts, so a number is all that has to travel: with the prompt, the one part of a sample that OpenRLHF
neither pads, nor computes with, nor logs.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

from fp16_patch.patching.sources import Installed
from fp16_patch.plan.guard import Guard

logger = logging.getLogger(__name__)

Call = Callable[..., Awaitable[Any]]
Run = tuple[int, int, int]
"""Tokens sampled with the same weights: the first one's position, how many, after how many broadcasts."""

_UPDATES = ("update_weight", "update_weight_cuda_ipc")
_SLOT = "_fp16_patch_versions"

guard = Guard(logger, "the age of sampled tokens is not known, training goes on")
# A sample is a task of its own: what its requests have drawn, each (start, tokens, runs).
_drawn: ContextVar[list[tuple[int, list[int], list[Run]]] | None] = ContextVar("fp16_patch_drawn", default=None)


class SampledPrompt(str):
    """A prompt that knows with which weights its response was sampled.

    Attributes:
        runs: with positions in prompt and response; what is in none of them has unknown weights.
    """

    __slots__ = ("runs",)
    runs: list[Run]

    def __new__(cls, prompt: str, runs: list[Run]) -> SampledPrompt:
        self = super().__new__(cls, prompt)
        self.runs = runs
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SampledPrompt, (str(self), self.runs)


def watch(engines: Sequence[Any]) -> None:
    """Have each engine's actor note the weights of what it samples, without waiting for it.

    On the actor and not on its class, which Ray sends by value; and only in runs that ask for it.
    """
    for engine in engines:
        engine.__ray_call__.remote(_watch)


def _watch(actor: Any) -> None:
    guard.run(lambda: _install(actor))


def _install(actor: Any) -> None:
    if hasattr(actor, _SLOT):
        return
    llm, executor = actor.llm, actor.executor
    noted = EngineVersions(llm)
    update, generate, execute = llm.collective_rpc, actor.generate, executor.execute
    llm.collective_rpc = partial(noted.update, update)
    actor.generate = partial(noted.generate, generate)
    executor.execute = partial(execute_and_note, execute)
    setattr(actor, _SLOT, noted)


@dataclass(eq=False)
class _Broadcast:
    """One change of the weights, and how many tokens the requests in progress had before and after it.

    Attributes:
        number: of broadcasts, with this one.
        after: of requests that stood still in between, and whose cache vLLM computes anew; of others nobody knows which
            weights the next tokens are of.
    """

    number: int
    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Request:
    """A request in progress: how many broadcasts it began after, None within one, and which have come since."""

    number: int | None
    broadcasts: list[_Broadcast]


class EngineVersions:
    """Counts the broadcasts to one engine, and knows where they fall in its requests.

    All of it happens on the event loop of the engine's actor, and nothing for each token.

    Args:
        llm: vLLM's `AsyncLLM`.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._number = 0
        self._broadcast: _Broadcast | None = None
        self._requests: set[_Request] = set()

    async def update(self, call: Call, method: Any, *args: Any, **kwargs: Any) -> Any:
        """`AsyncLLM.collective_rpc`, by which OpenRLHF sends one weight after the other."""
        if method not in _UPDATES:
            return await call(method, *args, **kwargs)
        if self._broadcast is None:
            guard.run(self._begin)
        result = await call(method, *args, **kwargs)
        # OpenRLHF has the last one, and no other, empty the cache.
        if kwargs.get("args", (False,))[-1]:
            await self._end()
        return result

    async def generate(self, call: Call, prompt_token_ids: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """`RolloutRayActor.generate`, one request: note what it has drawn."""
        within = self._broadcast
        request = _Request(None if within else self._number, [within] if within else [])
        self._requests.add(request)
        try:
            output = await call(prompt_token_ids, *args, **kwargs)
        finally:
            self._requests.discard(request)
        guard.run(lambda: self._note(request, len(prompt_token_ids), output))
        return output

    def _begin(self) -> None:
        self._broadcast = _Broadcast(self._number + 1)
        for request in self._requests:
            request.broadcasts.append(self._broadcast)
        self._broadcast.before = self._tokens()

    async def _end(self) -> None:
        try:
            stand_still = bool(self._requests) and _computes_caches_anew() and await self._llm.is_paused()
            if self._broadcast is not None and stand_still:
                self._broadcast.after = self._tokens()
        except Exception as failure:
            guard.warn(failure)
        self._broadcast = None
        self._number += 1

    def _tokens(self) -> dict[str, int]:
        states = self._llm.output_processor.request_states.values()
        return {
            getattr(state, "external_req_id", state.request_id): len(state.detokenizer.output_token_ids)
            for state in states
        }

    def _note(self, request: _Request, start: int, output: Any) -> None:
        drawn = _drawn.get()
        if drawn is None or output is None:
            return
        tokens = list(output.outputs[0].token_ids)
        drawn.append((start, tokens, runs_of(request, output.request_id, len(tokens))))


def runs_of(request: _Request, request_id: str, tokens: int) -> list[Run]:
    """Return the runs of a request that is done, with positions in its response."""
    cuts: list[tuple[int, int | None]] = [(0, request.number)]
    for broadcast in request.broadcasts:
        after = broadcast.after.get(request_id)
        # One that comes in between has no token before; one that vLLM does not know is done, or not yet there.
        before = broadcast.before.get(request_id, cuts[-1][0] if after is None else 0)
        cuts.append((before, None))
        if after is not None:
            cuts.append((after, broadcast.number))
    cuts.append((tokens, None))
    return [
        (start, end - start, number)
        for (start, number), (end, _) in pairwise(cuts)
        if number is not None and end > start
    ]


async def execute_and_note(call: Call, *args: Any, **kwargs: Any) -> Any:
    """`AgentExecutorBase.execute`, one sample of one or more requests: hand on what they have noted."""
    drawn: list[tuple[int, list[int], list[Run]]] = []
    _drawn.set(drawn)
    sample = await call(*args, **kwargs)
    guard.run(lambda: _hand_on(sample, drawn))
    return sample


def _hand_on(sample: Any, drawn: Sequence[tuple[int, list[int], list[Run]]]) -> None:
    # An executor of the user's may leave out what it has drawn, or put it elsewhere.
    sequence = list(sample["observation_tokens"])
    kept = [(start, runs) for start, tokens, runs in drawn if sequence[start : start + len(tokens)] == tokens]
    moved = [(start + first, count, number) for start, runs in kept for first, count, number in runs]
    if moved and isinstance(sample["prompt"], str):
        sample["prompt"] = SampledPrompt(sample["prompt"], moved)


@cache
def _computes_caches_anew() -> bool:
    """Return whether the installed vLLM drops the caches of requests that it pauses: they hold older weights' keys."""
    source = Installed().read("vllm.v1.engine.core") or ""
    return "_reset_caches" in source and "reset_running_requests" in source
