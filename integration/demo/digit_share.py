"""Reward an untrained model in OpenRLHF by `share_of_digits`, of which it earns some."""

import sys
from pathlib import Path

# OpenRLHF loads this file by its path, in a process that does not know the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from integration.demo.task import rewards, share_of_digits


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, object]:
    return rewards(share_of_digits, queries, prompts, labels)
