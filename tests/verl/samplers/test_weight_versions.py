"""Each token of a trajectory is noted with the label of its sync, whatever the requests that it takes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl")

from fp16_patch.verl.samplers.weight_versions import RUNS, generate, resumed_generate

pytestmark = pytest.mark.verl


class Server:
    """Answers requests one after the other: so many tokens, under such a label, and why it stopped."""

    def __init__(self, *answers: tuple[int, int, str]) -> None:
        self.answers = list(answers)

    def answer(self, **_request: Any) -> Any:
        tokens, label, stop = self.answers.pop(0)
        return SimpleNamespace(token_ids=[1] * tokens, extra_fields={"global_steps": label}, stop_reason=stop)


async def ask(server: Server, prompt: int) -> Any:
    async def wrapped(**request: Any) -> Any:
        return server.answer(**request)

    return await generate(wrapped, None, (), {"prompt_ids": [0] * prompt})


async def resume(server: Server, prompt: int) -> Any:
    """verl's own loop: goes on after an abort, and makes a result of its own."""

    async def wrapped(**_request: Any) -> Any:
        tokens: list[int] = []
        while True:
            output = await ask(server, prompt + len(tokens))
            tokens += output.token_ids
            if output.stop_reason != "aborted":
                return SimpleNamespace(token_ids=tokens, extra_fields={})

    return await resumed_generate(wrapped, None, (), {})


def runs(output: Any) -> list[list[int]]:
    return output.extra_fields[RUNS]["runs"]  # type: ignore[no-any-return]


def test_a_response_of_one_request_is_one_run() -> None:
    assert runs(asyncio.run(ask(Server((5, 3, "completed")), 10))) == [[10, 5, 3]]


def test_a_response_that_spans_a_sync_is_two() -> None:
    server = Server((5, 3, "aborted"), (0, 3, "aborted"), (4, 4, "completed"))
    assert runs(asyncio.run(resume(server, 10))) == [[10, 5, 3], [15, 4, 4]]


def test_every_turn_of_a_conversation_is_noted_in_what_its_first_turn_hands_on() -> None:
    async def conversation() -> Any:
        server = Server((5, 3, "completed"), (2, 4, "completed"))
        first = await ask(server, 10)
        await ask(server, 10 + 5 + 7)  # a tool has answered with seven tokens
        return first

    assert runs(asyncio.run(conversation())) == [[10, 5, 3], [22, 2, 4]]


def test_trajectories_of_their_own_tasks_do_not_mix() -> None:
    async def both() -> list[Any]:
        asked = (ask(Server((5, 3, "completed")), 10), ask(Server((6, 4, "completed")), 20))
        return await asyncio.gather(*map(asyncio.create_task, asked))

    assert [runs(output) for output in asyncio.run(both())] == [[[10, 5, 3]], [[20, 6, 4]]]


def test_a_conversation_that_begins_anew_is_another() -> None:
    async def again() -> list[Any]:
        server = Server((5, 3, "completed"), (6, 4, "completed"))
        return [await ask(server, 10), await ask(server, 12)]

    assert [runs(output) for output in asyncio.run(again())] == [[[10, 5, 3]], [[12, 6, 4]]]


def test_numpy_takes_what_rides_for_one_value() -> None:
    import numpy

    outputs = [asyncio.run(ask(Server((5, 3, "completed")), 10)).extra_fields[RUNS] for _ in range(2)]
    column = numpy.empty(2, dtype=object)
    column[:] = outputs
    assert column.tolist() == outputs
