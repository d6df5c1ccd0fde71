"""What a look at an update counts: checked against counting one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from fp16_patch import Plan
from fp16_patch.scaling import gradient_stats, retry, scale_growth
from fp16_patch.scaling import update as update_module
from fp16_patch.scaling.gradient_stats import GradientCounts, GradientStats, GradientStatsHooks, groups_of
from fp16_patch.scaling.random_state import RandomState
from fp16_patch.scaling.scaler import StepOutcome
from fp16_patch.scaling.update import MiniBatchUpdate

LAST_SUBNORMAL = 2.0**-14 * (1 - 2.0**-10)
NUMBERS = st.sampled_from([0.0, -0.0, 2.0**-24, -LAST_SUBNORMAL, 2.0**-14, -1.0, 65504.0, math.inf])


def counted(rows: list[list[float]]) -> GradientCounts:
    """One by one."""
    alive = [row for row in rows if any(row)]
    numbers = [number for row in alive for number in row]
    return GradientCounts(
        elements=len(numbers),
        underflown=sum(abs(number) < 2.0**-14 for number in numbers),
        zeros=sum(number == 0 for number in numbers),
        rows=len(rows),
        zero_rows=len(rows) - len(alive),
    )


@given(st.integers(1, 5).flatmap(lambda width: st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1)))
def test_zeros_and_subnormal_numbers_count_in_rows_that_are_not_zero_throughout(rows: list[list[float]]) -> None:
    found = GradientCounts(*gradient_stats._counted(torch.tensor(rows, dtype=torch.float16)).tolist())
    assert found == counted(rows)


def test_shares_are_of_what_there_is() -> None:
    assert GradientCounts(10, 5, 2, 4, 1).shares() == {"underflow": 0.5, "zeros": 0.2, "zero_rows": 0.25}
    assert GradientCounts(rows=4, zero_rows=4).shares() == {"zero_rows": 1.0}
    assert GradientCounts().shares() == {}


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
    found = GradientCounts(*gradient_stats._counted(gradient.transpose(0, 1)).tolist())
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
    with GradientStatsHooks(model) as hooks:
        model(torch.tensor([[0, 1, 2]])).float().square().sum().mul(2.0**-12).backward()
    counts = hooks.counts()
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

    def counts(layer_of: Any) -> dict[str, GradientCounts]:
        torch.manual_seed(0)
        model = Model().half()
        with GradientStatsHooks(model) as hooks:
            hidden = model.embedding(torch.tensor([[0, 1, 2]]))
            for layer in model.layers:
                hidden = layer_of(layer, hidden)
            model.head(model.norm(hidden)).float().square().sum().mul(2.0**-12).backward()
        return hooks.counts()

    plain = counts(lambda layer, hidden: layer(hidden))
    assert counts(lambda layer, hidden: checkpoint(layer, hidden, use_reentrant=reentrant)) == plain


def test_gradients_in_another_dtype_are_not_counted() -> None:
    model = Model()
    with GradientStatsHooks(model) as hooks:
        model(torch.tensor([[0, 1]])).sum().backward()
    assert hooks.counts() == {}


def test_the_metrics_are_the_headroom_and_shares_by_group() -> None:
    stats = GradientStats(scale=8.0, largest=32752.0, counts={"head": GradientCounts(10, 5, 2, 4, 1)})
    assert stats.unscaled == 4094.0
    assert stats.metrics() == {
        "fp16/gradient_headroom/min": 2.0,
        "fp16/underflow/head": 0.5,
        "fp16/zeros/head": 0.2,
        "fp16/zero_rows/head": 0.25,
    }
    assert GradientStats(8.0, 0.0, {}).metrics() == {}


def test_verl_averages_shares_over_mini_batches_and_takes_the_least_headroom() -> None:
    groups = (gradient_stats.EMBEDDING, *gradient_stats.LAYERS, gradient_stats.HEAD)
    metrics = GradientStats(1.0, 1.0, {group: GradientCounts(10, 5, 2, 4, 1) for group in groups}).metrics()
    # It goes by these parts of names.
    assert [name for name in metrics if "min" in name] == ["fp16/gradient_headroom/min"]
    assert not [name for name in metrics if "max" in name]


class Update(MiniBatchUpdate):
    """Of a model whose updates are not stepped on, and are skipped or taken as told."""

    def __init__(self, model: Any, skipped: bool) -> None:
        super().__init__(self, "actor")
        self.model, self.skipped = model, skipped
        # torch's scaler grows after so many updates, which no test here comes to.
        self.torch_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=100)

    @property
    def scaler(self) -> Any:
        return self.torch_scaler

    def module(self) -> Any:
        return self.model

    def note_dtypes(self) -> None:
        raise AssertionError("nothing steps here")

    nonfinite_gradients = zero_grad = note_dtypes

    def loss_is_finite(self, result: Any) -> bool:
        return True

    def retry_on_overflow(self, attempt: Any, forward_was_finite: Any) -> Any:
        """Two attempts, the first at a scale that is too high."""
        attempt(False)
        self.set_loss_scale(1024.0)
        result = attempt(True)
        self.history.add(StepOutcome(1024.0, self.skipped, 1.0))
        return result


def looked_at(skipped: bool, monkeypatch: pytest.MonkeyPatch) -> Update:
    """An update that was looked at."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda all_ranks, own: all_ranks.__setitem__(0, own))
    for module in (scale_growth, retry, update_module):
        monkeypatch.setattr(module, "current_plan", lambda: Plan(first_scale="fixed", gradient_look_every=1))
    update = Update(torch.nn.Linear(2, 2).half(), skipped)

    def compute() -> None:
        (update.model(torch.ones(1, 2).half()).float().sum() * update.loss_scale()).backward()

    update.run_mini_batch(compute, RandomState("cpu"))
    return update


def test_the_last_attempt_at_an_update_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    update = looked_at(False, monkeypatch)
    assert update.gradients is not None
    assert (update.gradients.scale, update.gradients.largest) == (1024.0, 1024.0)
    assert update.metrics()["fp16/gradient_headroom/min"] == 65504 / 1024
    monkeypatch.setattr(scale_growth, "current_plan", lambda: Plan(gradient_look_every=0))
    update.run_mini_batch(lambda: None, RandomState("cpu"))
    assert update.gradients is None
    assert update.metrics() == update.history.metrics()


def test_a_skipped_update_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    update = looked_at(True, monkeypatch)
    assert update.gradients is None
    assert update.metrics() == update.history.metrics()


@pytest.mark.parametrize("times", [1, 2])
def test_a_piece_of_a_flat_parameter_is_counted_once_however_often_its_module_runs(times: int) -> None:
    """As FSDP1 leaves its views unsharded between a forward pass and its repetition by checkpointing."""
    module = torch.nn.Identity()
    vars(module)["piece"] = piece = torch.nn.Parameter(torch.ones(6, dtype=torch.float16)).view(2, 3)
    hooks = GradientStatsHooks(torch.nn.Sequential(module))
    for _ in range(times):
        hooks.enter("0", module, ())
    piece.square().sum().backward()
    assert hooks.counts()["head"].rows == 2
