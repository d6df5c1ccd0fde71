"""What is watched in the models that SGLang serves, on its own classes, without an engine."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.sglang

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed here", allow_module_level=True)
torch = pytest.importorskip("torch")

from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.activation import activate, ledger
from fp16_patch.sglang.scheduler import model_loaded
from integration.cpu.launch import SGLANG_ENVIRONMENT, SGLANG_PACKAGES


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's own class of what makes log-probs of hidden states, without the ranks that it would ask."""
    monkeypatch.syspath_prepend(str(SGLANG_PACKAGES))
    for name, value in SGLANG_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from sglang.srt.layers.logits_processor import LogitsProcessor

    class Head(LogitsProcessor):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, input_ids: Any, hidden_states: Any) -> Any:
            return hidden_states.float()

    return Head()


def model() -> Any:
    """What SGLang's models have in common: layers, perhaps a language model among them, and how weights get in."""
    whole = torch.nn.Module()
    whole.layer, whole.language_model = torch.nn.Linear(2, 2, dtype=torch.float16), torch.nn.Module()
    whole.load_weights = lambda weights: None
    return whole


@pytest.mark.parametrize("owner", ["", "language_model"], ids=["text", "images and text"])
def test_hidden_states_are_seen_wherever_a_model_has_its_head(owner: str, head: Any) -> None:
    activate(Plan(mode="fp16"))
    served = model()
    served.get_submodule(owner).logits_processor = head
    model_loaded(None, SimpleNamespace(model=served))
    hidden = served.layer(torch.ones(1, 2, dtype=torch.float16))
    for dtype in (torch.bfloat16, torch.float32):
        head(None, hidden.to(dtype))
    # Of the first pass alone.
    assert ledger().roles["rollout"]["activation"] == ["bfloat16"]


def test_a_model_that_scores_sequences_has_no_such_head_and_is_served(head: Any) -> None:
    activate(Plan(mode="fp16"))
    served = model()
    model_loaded(None, SimpleNamespace(model=served))
    served.layer(torch.ones(1, 2, dtype=torch.float16))
    row = ledger().roles["rollout"]
    assert row["module_output"] == row["engine_weight"] == ["float16"]
    assert "activation" not in row
