"""What is watched in models of SGLang's classes, without an engine; prints a ledger's row for each as JSON.

Started by `test_scheduler.py`, in a process that finds SGLang's stand-ins for CUDA packages.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor

sys.path.insert(0, str(Path(__file__).parents[2]))
from fp16_patch.plan.plan import ROLE_ENV, Plan
from fp16_patch.runtime.activation import activate, ledger
from fp16_patch.sglang.scheduler import model_loaded

# Where a model has what makes log-probs of its hidden states; one that scores sequences has none.
OWNERS = {"text": "", "images and text": "language_model", "scores": None}


class Head(LogitsProcessor):
    """Without the ranks that it would ask."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def forward(self, input_ids: Any, hidden_states: torch.Tensor) -> None:
        pass


def served(owner: str | None) -> Any:
    model = torch.nn.Module()
    model.layer, model.language_model = torch.nn.Linear(2, 2, dtype=torch.float16), torch.nn.Module()
    model.load_weights = lambda weights: None
    if owner is not None:
        model.get_submodule(owner).logits_processor = Head()
    return model


def row(name: str, owner: str | None) -> dict[str, list[str]]:
    """Of a first pass that reaches the head in bfloat16, and a second in float32."""
    os.environ[ROLE_ENV] = name
    model, runner = served(owner), SimpleNamespace()
    runner.model = model
    model_loaded(None, runner)
    # As later releases do.
    states = SimpleNamespace(conv=[torch.empty(1, dtype=torch.bfloat16)], temporal=torch.empty(1))
    runner.req_to_token_pool = SimpleNamespace(mamba_pool=SimpleNamespace(mamba_cache=states))
    runner.token_to_kv_pool = SimpleNamespace(k_buffer=[torch.empty(1, dtype=torch.float16)])
    hidden_states = model.layer(torch.ones(1, 2, dtype=torch.float16))
    for dtype in (torch.bfloat16, torch.float32):
        for head in [module for module in model.modules() if isinstance(module, Head)]:
            head(None, hidden_states.to(dtype))
    return ledger().roles[name]


if __name__ == "__main__":
    activate(Plan(mode="fp16"))
    print(json.dumps({name: row(name, owner) for name, owner in OWNERS.items()}))
