"""The optimizer step in two passes, beside torch's own order on the same kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler

from fp16_patch.scaling import fused_step
from integration.bench.passes import GradientPasses

SHAPES = ((64, 33), (7,), (128, 16))


def scaler(scale: float = 2.0**12, **settings: Any) -> GradScaler:
    made = GradScaler("cpu", init_scale=scale, **settings)
    made.scale(torch.ones(()))
    return made


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(held: list[nn.Parameter], scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in held:
        spread = torch.randn(parameter.shape, generator=generator).mul(4).exp()
        parameter.grad = torch.randn(parameter.shape, generator=generator) * spread * scale


def gradients(held: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in held if parameter.grad is not None]


def torch_step(scaling: GradScaler, optimizer: torch.optim.Optimizer, held: list[nn.Parameter], clip: float) -> Tensor:
    scaling.unscale_(optimizer)
    norm: Tensor = nn.utils.clip_grad_norm_(held, clip)
    scaling.step(optimizer)
    scaling.update()
    return norm


def folded_step(scaling: GradScaler, optimizer: torch.optim.Optimizer, held: list[nn.Parameter], clip: float) -> Tensor:
    return fused_step.step(scaling, optimizer, fused_step.norm_of(gradients(held)), clip)


def state(optimizer: torch.optim.Optimizer, held: list[nn.Parameter]) -> list[Tensor]:
    moments = [value for parameter in held for _, value in sorted(optimizer.state[parameter].items())]
    return [*(parameter.detach() for parameter in held), *moments]


def trained(step: Callable[..., Tensor], clip: float, steps: int = 3) -> tuple[list[Tensor], list[Tensor], float]:
    """State, norms, scale after some steps of a scaler that grows at the second."""
    held = parameters()
    optimizer = torch.optim.AdamW(held, lr=1e-2, fused=True)
    scaling, norms = scaler(growth_interval=2), []
    for number in range(steps):
        give_gradients(held, scaling.get_scale(), seed=number)
        norms.append(step(scaling, optimizer, held, clip))
    return state(optimizer, held), norms, scaling.get_scale()


def test_without_clipping_it_is_torchs_step_to_the_last_bit() -> None:
    ours, theirs = trained(folded_step, clip=1e9), trained(torch_step, clip=1e9)
    assert all(map(torch.equal, ours[0], theirs[0]))
    assert ours[1:] == theirs[1:]


def test_where_it_clips_norm_and_scale_are_torchs_to_the_last_bit() -> None:
    ours, theirs = trained(folded_step, clip=1.0), trained(torch_step, clip=1.0)
    assert ours[1:] == theirs[1:]
    for mine, stock in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-9)


@settings(deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**16), st.integers(0, 16))
def test_a_clipped_gradient_is_torchs_within_one_unit_in_the_last_place(clip: float, seed: int, power: int) -> None:
    seen = []
    for step in (folded_step, torch_step):
        held = parameters()
        give_gradients(held, 2.0**power, seed)
        step(scaler(2.0**power), torch.optim.AdamW(held, fused=True), held, clip)
        seen.append(torch.cat([gradient.flatten() for gradient in gradients(held)]))
    ours, theirs = (values.view(torch.int32).long() for values in seen)
    assert (ours - theirs).abs().max() <= 1


def after_a_step() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW, Any]:
    """Parameters, optimizer and scaler, where one step was taken at a scale of 2¹²."""
    held = parameters()
    optimizer, scaling = torch.optim.AdamW(held, fused=True), scaler()
    give_gradients(held, 2.0**12, seed=0)
    folded_step(scaling, optimizer, held, 1.0)
    return held, optimizer, scaling


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_changes_nothing_and_halves_the_scale(bad: float) -> None:
    held, optimizer, scaling = after_a_step()
    before = copy.deepcopy(state(optimizer, held))
    give_gradients(held, 2.0**12, seed=1)
    gradients(held)[1][3] = bad
    norm = folded_step(scaling, optimizer, held, 1.0)
    assert not norm.isfinite()
    assert scaling.get_scale() == 2.0**11
    assert all(map(torch.equal, before, state(optimizer, held)))


@pytest.mark.parametrize("scale", [float("nan"), 0.0, -4.0])
def test_a_scale_that_is_none_changes_nothing(scale: float) -> None:
    held, optimizer, scaling = after_a_step()
    before = copy.deepcopy(state(optimizer, held))
    scaling._scale.fill_(scale)
    give_gradients(held, scale, seed=1)
    folded_step(scaling, optimizer, held, 1.0)
    assert all(map(torch.equal, before, state(optimizer, held)))


def test_finite_gradients_of_an_infinite_norm_change_nothing() -> None:
    held = parameters()
    optimizer = torch.optim.AdamW(held, fused=True)
    before = copy.deepcopy([parameter.detach() for parameter in held])
    give_gradients(held, 1e25, seed=0)
    scaling = scaler()
    assert not folded_step(scaling, optimizer, held, float("inf")).isfinite()
    assert all(map(torch.equal, before, held))
    assert scaling.get_scale() == 2.0**11


def passes_of(step: Callable[..., Tensor]) -> GradientPasses:
    held = parameters()
    optimizer = torch.optim.AdamW(held, fused=True)
    give_gradients(held, 2.0**12, seed=0)
    with GradientPasses(held) as counted:
        step(scaler(), optimizer, held, 1.0)
    return counted


def test_gradients_are_read_twice_and_by_torch_four_times() -> None:
    ours, theirs = passes_of(folded_step), passes_of(torch_step)
    assert (ours.passes, theirs.passes) == (2.0, 4.0)
    assert (ours.bytes_per_element, theirs.bytes_per_element) == (12.0, 24.0)


def test_adam_and_adamw_get_the_fused_kernel() -> None:
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        plain = kind([{"params": parameters()[:1], "lr": 0.5}, {"params": parameters()[1:]}], lr=0.1, betas=(0.8, 0.9))
        fused = fused_step.with_fused_kernel(plain, "cpu")
        assert type(fused) is kind
        assert fused_step.takes_loss_scale(fused, "cpu")
        assert not fused_step.takes_loss_scale(plain, "cpu")
        kept = [{**group, "fused": None, "foreach": None} for group in fused.param_groups]
        assert kept == plain.param_groups


@pytest.mark.parametrize(
    "make",
    [
        lambda held: torch.optim.AdamW(held, fused=False),
        lambda held: torch.optim.AdamW(held, foreach=True),
        lambda held: torch.optim.AdamW(held, foreach=False),
        lambda held: torch.optim.AdamW(held, fused=True),
        lambda held: torch.optim.AdamW(held, differentiable=True),
        lambda held: torch.optim.SGD(held, lr=0.1),
        lambda held: type("Adam8bit", (torch.optim.AdamW,), {})(held),
        lambda held: torch.optim.AdamW([nn.Parameter(held[0].detach().half())]),
    ],
    ids=["not-fused", "foreach", "single", "fused", "differentiable", "sgd", "subclass", "half"],
)
def test_a_chosen_kernel_and_other_optimizers_stay(make: Callable[[list[nn.Parameter]], Any]) -> None:
    optimizer = make(parameters())
    assert fused_step.with_fused_kernel(optimizer, "cpu") is optimizer


def test_what_is_offloaded_from_the_device_that_computes_stays() -> None:
    plain, fused = torch.optim.AdamW(parameters()), torch.optim.AdamW(parameters(), fused=True)
    assert fused_step.with_fused_kernel(plain, "cuda") is plain
    assert not fused_step.takes_loss_scale(fused, "cuda")


@pytest.mark.parametrize("chosen", [None, True], ids=["by-us", "by-configuration"])
def test_a_checkpoint_of_another_kernel_is_gone_on_with_on_ours(chosen: bool | None) -> None:
    held = parameters()
    plain = torch.optim.AdamW(held, lr=1e-2)
    give_gradients(held, 1.0, seed=0)
    plain.step()
    saved = copy.deepcopy(plain.state_dict())
    fused = fused_step.with_fused_kernel(torch.optim.AdamW(held, lr=1e-2, fused=chosen), "cpu")
    fused.load_state_dict(saved)
    assert fused_step.takes_loss_scale(fused, "cpu")
    give_gradients(held, 2.0**12, seed=1)
    folded_step(scaler(), fused, held, 1.0)
    assert {float(fused.state[parameter]["step"]) for parameter in held} == {2.0}
    assert saved["param_groups"][0]["fused"] is None
