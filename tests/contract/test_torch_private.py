"""torch's private names that we depend on mean what they did: each is held against what torch does in public."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fp16_patch.runtime import torch_private

GROWTH_INTERVAL = 3


@pytest.fixture
def weight() -> Any:
    return torch.nn.Parameter(torch.ones(4))


@pytest.fixture
def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=GROWTH_INTERVAL)


def backward(scaler: Any, weight: Any, factor: float = 1.0) -> None:
    weight.grad = None
    scaler.scale((weight * factor).sum()).backward()


def test_the_scale_on_the_device_is_the_one_that_get_scale_returns(scaler: Any, weight: Any) -> None:
    with pytest.raises(RuntimeError, match="no loss was scaled"):
        torch_private.scale_on_device(scaler)
    backward(scaler, weight)
    scale = torch_private.scale_on_device(scaler)
    assert (scale.shape, scale.dtype, float(scale)) == ((), torch.float32, scaler.get_scale())


def test_steps_are_counted_until_the_scale_grows(scaler: Any, weight: Any) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    counts = []
    for _ in range(GROWTH_INTERVAL):
        backward(scaler, weight)
        scaler.step(optimizer)
        scaler.update()
        counts.append(torch_private.steps_since_growth(scaler))
    assert counts == [1, 2, 0]
    assert scaler.get_scale() == 128.0


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [True, False])
def test_fused_kernels_and_no_others_take_a_scale(kind: Any, fused: bool, weight: Any) -> None:
    assert torch_private.takes_grad_scale(kind([weight], fused=fused)) is fused


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_gradients_marked_unscaled_are_stepped_with_or_skipped_as_after_unscale(
    found: float, scaler: Any, weight: Any
) -> None:
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    expected, reference = torch.nn.Parameter(torch.ones(4)), torch.amp.GradScaler("cpu", init_scale=64.0)
    by_torch = torch.optim.AdamW([expected], lr=0.1, fused=True)
    backward(reference, expected, factor=1.0 if found == 0.0 else float("inf"))
    reference.unscale_(by_torch)
    reference.step(by_torch)
    reference.update()

    backward(scaler, weight)
    torch_private.mark_unscaled(scaler, optimizer, torch.tensor(found))
    optimizer.grad_scale = torch_private.scale_on_device(scaler)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, expected)
    assert torch.equal(weight, torch.ones(4)) == bool(found)
    assert scaler.get_scale() == reference.get_scale()
    with pytest.raises(RuntimeError, match="unscale_"):
        torch_private.mark_unscaled(scaler, optimizer, torch.tensor(found))
        scaler.unscale_(optimizer)


def test_the_store_of_a_job_is_the_one_that_its_ranks_were_given() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch_private.job_store().set("said", "by a rank")
        assert torch_private.job_store().check(["said"])
        assert not torch_private.job_store().check(["never said"])
    finally:
        torch.distributed.destroy_process_group()
