"""Each token that an engine's actor samples is noted with the broadcast that its weights came by."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Coroutine
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openrlhf")
torch = pytest.importorskip("torch")
try:
    from openrlhf.utils.agent import SingleTurnAgentExecutor
except ImportError:
    pytest.skip("up to 0.9.0, engines sample without an executor", allow_module_level=True)

from fp16_patch.openrlhf.samplers import weight_versions

pytestmark = pytest.mark.openrlhf

PROMPT = "the prompt"
PROMPT_TOKENS = 4
SAMPLED = 7
Script = Callable[["Engine"], Coroutine[Any, Any, None]]


class LLM:
    """vLLM's `AsyncLLM`, as far as weights are sent to it and its requests are counted."""

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={})
        self.calls: list[Any] = []
        self.paused = False

    async def collective_rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> str:
        self.calls.append(method)
        await asyncio.sleep(0)
        return "done"

    async def is_paused(self) -> bool:
        return self.paused


class Engine:
    """OpenRLHF's `RolloutRayActor` with its own executor; a test says when a token is drawn."""

    def __init__(self, executor: Any = None) -> None:
        self.llm = LLM()
        self.executor = executor or SingleTurnAgentExecutor()
        self._drawn = asyncio.Semaphore(0)
        self._ids = count()
        weight_versions._watch(self)

    async def generate(self, prompt_token_ids: Any, sampling_params: Any, multi_modal_data: Any = None) -> Any:
        name, tokens = str(next(self._ids)), []
        detokenizer = SimpleNamespace(output_token_ids=tokens)
        states = self.llm.output_processor.request_states
        states[name] = SimpleNamespace(request_id="of vLLM's own", external_req_id=name, detokenizer=detokenizer)
        while len(tokens) < sampling_params.max_tokens:
            await self._drawn.acquire()
            tokens.append(SAMPLED + len(tokens))
        del states[name]
        return SimpleNamespace(request_id=name, outputs=[SimpleNamespace(
            token_ids=tokens, text="", finish_reason="length", logprobs=None
        )])  # fmt: skip

    async def draw(self, tokens: int) -> None:
        for _ in range(tokens):
            self._drawn.release()
        await settled()

    async def broadcast(self, *, pause: bool = False, between: int = 0) -> None:
        """Send two weights, as `ActorPPOTrainer.broadcast_to_vllm` does; so many tokens are drawn before the second."""
        self.llm.paused = pause
        await self.llm.collective_rpc("update_weight", args=("first", "float16", (1,), False))
        await self.draw(between)
        await self.llm.collective_rpc("update_weight", args=("last", "float16", (1,), True))
        self.llm.paused = False


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Tokenizer:
    def __call__(self, **_text: Any) -> Any:
        return {"input_ids": torch.ones(1, PROMPT_TOKENS, dtype=torch.long)}


def arguments(tokens: int) -> dict[str, Any]:
    sampling = SimpleNamespace(max_tokens=tokens, logprobs=None)
    return {"prompt": PROMPT, "label": "", "sampling_params": sampling, "max_length": 64, "hf_tokenizer": Tokenizer()}


def sampled(tokens: int, script: Script, executor: Any = None) -> Any:
    """Return the sample of one response of so many tokens, in whose course the script runs."""

    async def run() -> Any:
        engine = Engine(executor)
        response = asyncio.create_task(engine.executor.execute(**arguments(tokens), llm_engine=engine))
        await settled()
        await script(engine)
        await engine.draw(tokens)
        return await response

    return asyncio.run(run())


def runs(sample: Any) -> Any:
    return sample["prompt"].runs


@pytest.fixture(autouse=True)
def new_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed vLLM computes the caches of paused requests anew."""
    monkeypatch.setattr(weight_versions, "_computes_caches_anew", lambda: True)


def test_a_response_between_two_broadcasts_is_one_run() -> None:
    async def script(engine: Engine) -> None:
        await engine.draw(2)

    sample = sampled(5, script)
    assert runs(sample) == [(PROMPT_TOKENS, 5, 0)]
    assert sample["prompt"] == PROMPT


def test_a_response_that_is_paused_for_a_broadcast_is_split_where_it_stood() -> None:
    async def script(engine: Engine) -> None:
        await engine.draw(2)
        await engine.broadcast(pause=True)
        await engine.draw(1)
        await engine.broadcast(pause=True)

    assert runs(sampled(6, script)) == [(PROMPT_TOKENS, 2, 0), (PROMPT_TOKENS + 2, 1, 1), (PROMPT_TOKENS + 3, 3, 2)]


def test_a_token_that_is_told_late_has_unknown_weights() -> None:
    async def script(engine: Engine) -> None:
        await engine.draw(2)
        await engine.broadcast(pause=True, between=1)

    assert runs(sampled(6, script)) == [(PROMPT_TOKENS, 2, 0), (PROMPT_TOKENS + 3, 3, 1)]


def test_what_is_drawn_while_weights_change_and_after_it_is_unknown_without_a_pause() -> None:
    async def script(engine: Engine) -> None:
        await engine.draw(2)
        await engine.broadcast(between=1)

    assert runs(sampled(6, script)) == [(PROMPT_TOKENS, 2, 0)]


def test_caches_of_older_weights_make_the_rest_of_a_response_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_versions, "_computes_caches_anew", lambda: False)

    async def script(engine: Engine) -> None:
        await engine.draw(2)
        await engine.broadcast(pause=True)

    assert runs(sampled(6, script)) == [(PROMPT_TOKENS, 2, 0)]


def test_a_request_that_comes_in_the_middle_of_a_broadcast_has_the_new_weights_if_it_had_to_wait() -> None:
    async def run(pause: bool) -> Any:
        engine = Engine()
        engine.llm.paused = pause
        await engine.llm.collective_rpc("update_weight", args=("first", "float16", (1,), False))
        response = asyncio.create_task(engine.executor.execute(**arguments(3), llm_engine=engine))
        await settled()
        await engine.llm.collective_rpc("update_weight", args=("last", "float16", (1,), True))
        await engine.draw(3)
        return await response

    assert runs(asyncio.run(run(pause=True))) == [(PROMPT_TOKENS, 3, 1)]
    assert type(asyncio.run(run(pause=False))["prompt"]) is str


def test_samples_of_one_prompt_do_not_mix() -> None:
    async def run() -> Any:
        engine = Engine()
        both = asyncio.gather(*(engine.executor.execute(**arguments(n), llm_engine=engine) for n in (2, 4)))
        await settled()
        await engine.draw(4)
        await engine.broadcast(pause=True)
        await engine.draw(2)
        return await both

    first, second = asyncio.run(run())
    assert runs(first) == [(PROMPT_TOKENS, 2, 0)]
    assert runs(second) == [(PROMPT_TOKENS, 2, 0), (PROMPT_TOKENS + 2, 2, 1)]


class Agent:
    """An executor of the user's: two turns, between which a tool answers; `drops` a token of the first."""

    def __init__(self, drops: int = 0) -> None:
        self.drops = drops

    async def execute(self, prompt: str, sampling_params: Any, llm_engine: Any, **_others: Any) -> Any:
        tokens = [1] * PROMPT_TOKENS
        for answer in ([2, 2, 2], []):
            output = await llm_engine.generate(tokens, sampling_params)
            tokens = [*tokens, *output.outputs[0].token_ids[self.drops :], *answer]
        return {"prompt": prompt, "observation_tokens": tokens}


def test_every_turn_of_a_users_own_executor_is_noted() -> None:
    async def script(engine: Engine) -> None:
        await engine.draw(2)
        await engine.broadcast(pause=True)

    assert runs(sampled(2, script, Agent())) == [(PROMPT_TOKENS, 2, 0), (PROMPT_TOKENS + 2 + 3, 2, 1)]


def test_what_an_executor_does_not_hand_on_as_it_was_drawn_is_unknown() -> None:
    async def script(engine: Engine) -> None:
        await engine.draw(2)

    assert type(sampled(2, script, Agent(drops=1))["prompt"]) is str


def test_other_calls_to_workers_are_passed_on_and_not_counted() -> None:
    async def run() -> Any:
        engine = Engine()
        assert await engine.llm.collective_rpc("init_process_group", args=(True,)) == "done"
        assert await engine.llm.collective_rpc(print) == "done"
        await engine.broadcast()
        assert engine.llm.calls == ["init_process_group", print, "update_weight", "update_weight"]
        response = asyncio.create_task(engine.executor.execute(**arguments(1), llm_engine=engine))
        await engine.draw(1)
        return await response

    assert runs(asyncio.run(run())) == [(PROMPT_TOKENS, 1, 1)]


def test_an_error_of_ours_costs_the_age_and_nothing_else() -> None:
    async def script(engine: Engine) -> None:
        await engine.draw(2)
        del engine.llm.output_processor.request_states["0"].detokenizer
        await engine.broadcast(pause=True)

    sample = sampled(4, script)
    assert sample["observation_tokens"][PROMPT_TOKENS:] == [SAMPLED + position for position in range(4)]
    assert type(sample["prompt"]) is str


def test_an_actor_that_holds_its_engine_otherwise_is_left_alone() -> None:
    actor = SimpleNamespace(llm=SimpleNamespace(collective_rpc=print))
    weight_versions._watch(actor)
    assert actor.llm.collective_rpc is print


def test_the_runs_travel_with_the_prompt() -> None:
    prompt = pickle.loads(pickle.dumps(weight_versions.SampledPrompt(PROMPT, [(4, 2, 1)])))
    assert prompt == PROMPT
    assert {PROMPT: "of a dataset"}[prompt] == "of a dataset"
    assert prompt.runs == [(4, 2, 1)]
