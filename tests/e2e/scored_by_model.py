"""Rewards for verl's reward loop: the score that a reward model, served beside the run, gives a response."""

from __future__ import annotations

from typing import Any

import aiohttp


async def score_of_vllm(
    data_source: str, solution_str: str, ground_truth: str, reward_router_address: str, **_settings: Any
) -> float:
    request = {"input": _input(solution_str), "use_activation": False}
    return float((await _answer(reward_router_address, "classify", request))["probs"][-1])


async def score_of_sglang(
    data_source: str, solution_str: str, ground_truth: str, reward_router_address: str, **_settings: Any
) -> float:
    request = {"model": "reward", "input": _input(solution_str)}
    return float((await _answer(reward_router_address, "v1/embeddings", request))["embedding"][-1])


def _input(response: str) -> str:
    # Servers refuse an empty one, and a response may be empty.
    return f"={response}"


async def _answer(address: str, endpoint: str, request: dict[str, object]) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.post(f"http://{address}/{endpoint}", json=request) as answer:
        answer.raise_for_status()
        return dict((await answer.json())["data"][-1])
