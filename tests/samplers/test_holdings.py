"""What a sampler's process notes of its model: weights, what it keeps, and what its modules really compute in."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

import fp16_patch
from fp16_patch import Plan
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import ledger
from fp16_patch.runtime.ledger import judge
from fp16_patch.samplers.holdings import begins_a_sync, note_held, note_weights, watch_modules

ROLE = "rollout"


class Layer(nn.Module):
    """A layer in half precision; one that forces a dtype computes in that, and gives back what it got."""

    def __init__(self, forced: Any = None) -> None:
        super().__init__()
        self.forced = forced
        self.inner = nn.Identity()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float16))

    def forward(self, states: Any) -> tuple[Any, None]:
        computed = self.inner(states if self.forced is None else states.to(self.forced))
        return computed.to(states.dtype) * self.weight, None


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, states: Any) -> Any:
        for layer in self.layers:
            states, _ = layer(states)
        return states


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The records that this process leaves, with a plan in force."""
    fp16_patch.activate(Plan(strict=False))
    published: list[Any] = []
    monkeypatch.setattr(propagation, "publish", published.append)
    return published


@pytest.mark.parametrize(
    ("forced", "seen", "wrong"),
    [
        (None, ["float16"], False),
        (torch.float32, ["float16", "float32"], False),
        (torch.bfloat16, ["bfloat16", "float16"], True),
    ],
    ids=str,
)
def test_a_layer_that_computes_in_another_dtype_than_its_weights_is_seen(
    forced: Any, seen: list[str], wrong: bool, told: list[Any]
) -> None:
    model = Model(Layer(), Layer(forced))
    note_weights(ROLE, model)
    watch_modules(ROLE, model)
    for _ in range(2):
        assert model(torch.ones(2, 4, dtype=torch.float16)).dtype == torch.float16
    assert ledger().roles[ROLE] == {"engine_weight": ["float16"], "module_output": seen}
    assert told[-1]["roles"][ROLE]["module_output"] == seen
    findings = [each for each in judge(told[-1:], Plan(), {}) if each.quantity == "module_output"]
    assert [each.seen for each in findings] == (["bfloat16, float16"] if wrong else [])


def test_modules_are_watched_for_one_call(told: list[Any]) -> None:
    model = Model(Layer())
    watch_modules(ROLE, model)
    model(torch.ones(2, 4, dtype=torch.float16))
    count = len(told)
    # A list of modules is never called, and keeps its hook.
    assert not any(module._forward_hooks for module in model.modules() if not isinstance(module, nn.ModuleList))
    model(torch.ones(2, 4, dtype=torch.float64))
    assert len(told) == count
    assert ledger().roles[ROLE]["module_output"] == ["float16"]


def test_the_first_weights_of_each_sync_begin_it() -> None:
    class Receiver:
        """Holds a model."""

    receiver, buckets = Receiver(), (["a", "b"], ["c"])
    begins = [begins_a_sync(receiver, names) for _ in range(2) for names in buckets]
    assert begins == [True, False, True, False]


def held(model: nn.Module) -> dict[str, str]:
    note_held((0, 1), model)
    return dict(ledger().held or {})


def test_what_a_sync_leaves_is_told_from_what_was_there_before() -> None:
    model, twin = Model(Layer(), Layer()), Model(Layer(), Layer())
    assert held(model) == held(twin)
    assert held(model)["rank"] == "(0, 1)"
    with torch.no_grad():
        model.layers[1].weight[2] += 2**-9  # the last bit of a half
    assert held(model)["digest"] != held(twin)["digest"]


def test_a_weight_that_is_stored_transposed_is_read_as_it_lies() -> None:
    model = nn.Linear(3, 2)
    before = held(model)["digest"]
    model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    assert not model.weight.is_contiguous()
    assert held(model)["digest"] != before  # another layout is another part


def test_an_error_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    note_held(0, None)
    assert ledger().held is None
    assert "not compared with the others'" in caplog.text


def test_a_model_without_floating_weights_has_a_digest_all_the_same() -> None:
    assert held(nn.Identity()) == {"rank": "(0, 1)", "digest": ""}
