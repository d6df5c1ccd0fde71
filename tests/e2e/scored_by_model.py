"""A reward for verl's reward loop: the score that a reward model, served by vLLM beside the run, gives a response."""

from __future__ import annotations

from typing import Any

import aiohttp


async def compute_score(
    data_source: str, solution_str: str, ground_truth: str, reward_router_address: str, **_settings: Any
) -> float:
    # vLLM refuses an empty input, and a response may be empty.
    request = {"input": f"={solution_str}", "use_activation": False}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{reward_router_address}/classify", json=request) as response,
    ):
        response.raise_for_status()
        return float((await response.json())["data"][-1]["probs"][-1])
