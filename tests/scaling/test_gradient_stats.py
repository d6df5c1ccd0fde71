"""What a look at an update counts: checked against counting one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from fp16_patch.scaling import gradient_stats
from fp16_patch.scaling.gradient_stats import Counts, Figures, Look, groups_of
from fp16_patch.scaling.scaler import StepHistory, StepOutcome

LAST_SUBNORMAL = 2.0**-14 * (1 - 2.0**-10)
NUMBERS = st.sampled_from([0.0, -0.0, 2.0**-24, -LAST_SUBNORMAL, 2.0**-14, -1.0, 65504.0, math.inf])


def counted(rows: list[list[float]]) -> Counts:
    """One by one."""
    alive = [row for row in rows if any(row)]
    numbers = [number for row in alive for number in row]
    return Counts(
        elements=len(numbers),
        underflown=sum(abs(number) < 2.0**-14 for number in numbers),
        zeros=sum(number == 0 for number in numbers),
        rows=len(rows),
        zero_rows=len(rows) - len(alive),
    )


@given(st.integers(1, 5).flatmap(lambda width: st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1)))
def test_zeros_and_subnormal_numbers_count_in_rows_that_are_not_zero_throughout(rows: list[list[float]]) -> None:
    found = Counts(*gradient_stats._counted(torch.tensor(rows, dtype=torch.float16)).tolist())
    assert found == counted(rows)


def test_shares_are_of_what_there_is() -> None:
    assert Counts(10, 5, 2, 4, 1).shares() == {"underflow": 0.5, "zeros": 0.2, "zero_rows": 0.25}
    assert Counts(rows=4, zero_rows=4).shares() == {"zero_rows": 1.0}
    assert Counts().shares() == {}


def test_a_vector_is_one_row_and_a_number_too() -> None:
    assert gradient_stats.sampled_rows(torch.ones(7)).shape == (1, 7)
    assert gradient_stats.sampled_rows(torch.ones(())).shape == (1, 1)


def test_of_a_large_gradient_evenly_spread_rows_are_counted_and_stand_for_all() -> None:
    rows, width = 6000, 512
    gradient = torch.ones(2, rows // 2, width, dtype=torch.float16)
    gradient[:, : rows // 8] = 0.0
    gradient[..., : width // 4] = 2.0**-20
    gradient[:, : rows // 8, : width // 4] = 0.0
    # Not contiguous, as the gradient of a transposed output.
    sample = gradient_stats.sampled_rows(gradient.transpose(0, 1))
    assert 8 * width <= sample.numel() <= 4 * gradient_stats.SAMPLED_ELEMENTS
    found = Counts(*gradient_stats._counted(gradient.transpose(0, 1)).tolist())
    assert found.rows == pytest.approx(rows)
    assert found.shares()["underflow"] == 0.25
    assert found.shares()["zero_rows"] == pytest.approx(0.25, abs=0.05)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(4, 4, bias=False), torch.nn.LayerNorm(4)
        # As experts are, in a list within the stack.
        self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False)])

    def forward(self, hidden: Any) -> Any:
        return hidden + self.experts[0](self.linear(self.norm(hidden)))


class Model(torch.nn.Module):
    def __init__(self, layers: int = 4, images: bool = False) -> None:
        super().__init__()
        if images:
            self.patches = torch.nn.Linear(4, 4)
            self.blocks = torch.nn.ModuleList([Layer() for _ in range(3)])
        self.embedding = torch.nn.Embedding(5, 4)
        self.layers = torch.nn.ModuleList([Layer() for _ in range(layers)])
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 5, bias=False)

    def forward(self, tokens: Any) -> Any:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


def named_groups(model: Any) -> dict[str, str]:
    groups = groups_of(model)
    return {name: groups[module] for name, module in model.named_modules() if module in groups}


def test_modules_lie_in_the_embedding_in_a_third_of_the_layers_or_in_the_head() -> None:
    groups = named_groups(Model(layers=6))
    assert (groups["embedding"], groups["norm"], groups["head"]) == ("embedding", "head", "head")
    thirds = [groups[f"layers.{place}.linear"] for place in range(6)]
    assert thirds == ["early_layers"] * 2 + ["middle_layers"] * 2 + ["late_layers"] * 2
    assert groups["layers.5.experts.0"] == "late_layers"
    assert not {"", "layers", "layers.0", "layers.0.experts"} & set(groups)


def test_of_two_stacks_what_lies_before_the_last_is_embedding() -> None:
    groups = named_groups(Model(images=True))
    assert (groups["patches"], groups["embedding"], groups["head"]) == ("embedding", "embedding", "head")
    assert groups["blocks.0.linear"] == groups["layers.0.linear"] == "early_layers"


def test_a_model_without_layers_is_a_head() -> None:
    assert set(groups_of(torch.nn.Sequential(torch.nn.Linear(2, 2))).values()) == {"head"}


def test_fp16_gradients_of_outputs_and_parameters_are_counted_once() -> None:
    torch.manual_seed(0)
    model = Model().half()
    with Look(model) as look:
        model(torch.tensor([[0, 1, 2]])).float().square().sum().mul(2.0**-12).backward()
    counts = look.counts()
    # 3 tokens; the embedding's rows of words 3 and 4 are zero.
    assert counts["embedding"].rows == 5 + 3
    assert counts["embedding"].zero_rows == 2
    # A norm gives 3 rows, its weight and bias are one each; the head's weight has 5, its output 3.
    assert counts["head"].rows == (3 + 1 + 1) + (5 + 3)
    assert 0 < counts["early_layers"].shares()["underflow"] < 1
    assert not model.head._forward_hooks


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_activation_checkpointing_the_same_is_counted(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def counts(layer_of: Any) -> dict[str, Counts]:
        torch.manual_seed(0)
        model = Model().half()
        with Look(model) as look:
            hidden = model.embedding(torch.tensor([[0, 1, 2]]))
            for layer in model.layers:
                hidden = layer_of(layer, hidden)
            model.head(model.norm(hidden)).float().square().sum().mul(2.0**-12).backward()
        return look.counts()

    plain = counts(lambda layer, hidden: layer(hidden))
    assert counts(lambda layer, hidden: checkpoint(layer, hidden, use_reentrant=reentrant)) == plain


def test_gradients_in_another_dtype_are_not_counted() -> None:
    model = Model()
    with Look(model) as look:
        model(torch.tensor([[0, 1]])).sum().backward()
    assert look.counts() == {}


def test_the_metrics_are_the_headroom_and_shares_by_group() -> None:
    figures = Figures(scale=8.0, largest=32752.0, counts={"head": Counts(10, 5, 2, 4, 1)})
    assert figures.unscaled == 4094.0
    assert figures.metrics() == {
        "fp16/gradient_headroom/min": 2.0,
        "fp16/underflow/head": 0.5,
        "fp16/zeros/head": 0.2,
        "fp16/zero_rows/head": 0.25,
    }
    assert Figures(8.0, 0.0, {}).metrics() == {}


def test_verl_averages_shares_over_mini_batches_and_takes_the_least_headroom() -> None:
    groups = (gradient_stats.EMBEDDING, *gradient_stats.LAYERS, gradient_stats.HEAD)
    metrics = Figures(1.0, 1.0, {group: Counts(10, 5, 2, 4, 1) for group in groups}).metrics()
    # It goes by these parts of names.
    assert [name for name in metrics if "min" in name] == ["fp16/gradient_headroom/min"]
    assert not [name for name in metrics if "max" in name]


class Step:
    def __init__(self, model: Any, scale: float) -> None:
        self.engine, self.history, self._model, self.scale = self, StepHistory(), model, scale

    def loss_scale(self) -> float:
        return self.scale

    def module(self) -> Any:
        return self._model


def looked(skipped: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Step, Figures | None]:
    """Two attempts at one update, the first at a scale that is too high."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda all_ranks, own: all_ranks.__setitem__(0, own))
    step = Step(torch.nn.Linear(2, 2).half(), scale=2.0**17)
    looks = gradient_stats.Looking(step)  # type: ignore[arg-type]

    def compute() -> None:
        (step.model(torch.ones(1, 2).half()).float().sum() * step.scale).backward()

    step.model = step.module()
    attempt = looks.through(compute)
    attempt()
    step.scale = 1024.0
    attempt()
    step.history.add(StepOutcome(1024.0, skipped, 1.0))
    return step, looks.figures()


def test_the_last_attempt_at_an_update_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    step, figures = looked(False, monkeypatch)
    assert figures is not None
    assert (figures.scale, figures.largest) == (1024.0, 1024.0)
    assert gradient_stats.metrics_of(step)["fp16/gradient_headroom/min"] == 65504 / 1024
    gradient_stats.forget(step)
    assert gradient_stats.metrics_of(step) == {}


def test_a_skipped_update_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step, figures = looked(True, monkeypatch)
    assert figures is None
    assert gradient_stats.metrics_of(step) == {}
